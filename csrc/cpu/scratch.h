// What every op of the engine needs around its arithmetic: scratch memory and threads.
// Included inside the instruction set's namespace.

// Part `part` of `parts` of 0..count.
struct Share {
  const int64_t begin, end;
  Share(int64_t count, int64_t part, int64_t parts)
      : begin(count * part / parts), end(count * (part + 1) / parts) {}
  Share(int64_t begin, int64_t end) : begin(begin), end(end) {}
};

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out pieces of one allocation; used twice, first to measure and then for real.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
#if defined(__SANITIZE_ADDRESS__)  // pieces are kept apart, and nothing may touch what lies between
    if (base_) {
      ASAN_UNPOISON_MEMORY_REGION(piece, bytes);  // by an earlier call that had this memory
      ASAN_POISON_MEMORY_REGION(base_ + used_ + bytes, round_up(bytes, 64) + 64 - bytes);
    }
    used_ += 64;
#endif
    used_ += round_up(bytes, 64);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Gives `user` the scratch that its take_memory asks for.
template <class User>
void take_all(const Host& host, User& user) {
  Arena measure;
  user.take_memory(measure);
  Arena arena(host.allocate(host.allocator, measure.used()));
  user.take_memory(arena);
}

// Calls f(begin, end) over 0..count, on several threads if that is `worthwhile`.
template <class F>
void parallel(const Host& host, int64_t count, bool worthwhile, const F& f) {
  if (host.threads <= 1 || count <= 1 || !worthwhile) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  host.parallel_for(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

// Runs phase(team, member, phase number) for all teams.
template <class Phase>
void run_teams(const Host& host, int64_t teams, int64_t members, bool worthwhile, int64_t phases,
               const Phase& phase) {
  Parts parts(teams * members);
  parallel(host, teams * members, worthwhile, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t team = task / members;
      run_phases(parts.data + team * members, static_cast<int>(members),
                 static_cast<int>(task % members), phases,
                 [&](int64_t number, int member) { phase(team, member, number); });
    }
  });
}
