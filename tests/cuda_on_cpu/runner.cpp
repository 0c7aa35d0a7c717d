#include "runner.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../../csrc/dtype.h"
#include "memory.h"

namespace fused_rnn::cuda_on_cpu {
namespace {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 256 << 10;
constexpr size_t most_shared_bytes = 227 << 10;

std::string at_site(Site site) { return Place(site).text(); }

struct Random {
  uint64_t state = 0;
  uint64_t operator()() {  // splitmix64 (Steele, Lea and Flood 2014)
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>((*this)() % n); }
};

struct Schedule {
  uint64_t seed = 0, launches = 0, digest = 0;
};
Schedule schedule;

// Stacks are kept from launch to launch; one has a page below it that faults.
class Stacks {
 public:
  char* take() {
    if (!free_.empty()) {
      char* stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* memory = mmap(nullptr, stack_bytes + 4096, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fibre");
    mprotect(memory, 4096, PROT_NONE);
    return static_cast<char*>(memory) + 4096;
  }
  void give_back(char* stack) { free_.push_back(stack); }

 private:
  std::vector<char*> free_;
};
Stacks stacks;

struct Block;
struct Thread;

// Threads that wait for each other at one line.
struct Meeting {
  std::vector<Thread*> waiting;
  Site site{};
};

struct Thread {
  enum class State { ready, waiting, finished };

  uint32_t id = 0;  // in the grid
  unsigned index = 0;
  Block* block = nullptr;
  State state = State::ready;
  char* stack = nullptr;
  ucontext_t context;

  uint32_t now = 1;
  Knowledge knows;
  Knowledge read_relaxed;           // what a fence would make known
  std::optional<Knowledge> fenced;  // what relaxed stores after a fence publish
  Reach fence_reach = Reach::none;

  const char* waits = nullptr;  // for what, if waiting
  Site site{};                  // of the last synchronising operation
  uintptr_t address = 0;        // that it waits for
  uint64_t cluster_phase = 0;   // of the last arrival
  bool arrived_at_cluster = false;

  const void* operands[3] = {};  // of a warp operation
  uint64_t argument = 0, result = 0;

  uint32_t copies = 0;                       // started so far: the time of its agent
  std::deque<std::vector<uint32_t>> groups;  // committed, of copy_async
  std::vector<uint32_t> open_group;
};

struct StaticArray {
  char* data;
  size_t bytes;
  const char* name;
};

struct Cluster {
  std::vector<Block*> blocks;
  uint64_t phase = 0;
  unsigned arrived = 0;
  Knowledge gathering, passed_on;
  std::vector<Thread*> waiting;
};

struct Block {
  unsigned index = 0;  // linear
  Position at{};
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned finished = 0;
  bool started = false;
  Meeting all;
  std::map<unsigned, Meeting> some;
  std::vector<Meeting> warps;
  char* shared = nullptr;
  std::map<const void*, StaticArray> arrays;
};

// A place that releases publish through and acquires learn from.
struct Flag {
  Knowledge released;
  Reach reach = Reach::none;
  unsigned block = 0;
};

struct TransactionBarrier {
  unsigned count = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet there; negative if they came first
  uint64_t phase = 0;
  Knowledge gathering, passed_on;
  std::vector<Thread*> waiting;
};

// A copy that was started and has not been done.
struct Copy {
  void* to;
  const void* from;  // null: `value`
  unsigned char value[16];
  size_t bytes;
  void* barrier;
  bool fenced;  // whether it goes past the generic path to memory
  Thread* thread;
  uint32_t time;
  Knowledge knows;
  Site site;
};

class Launch;
Launch* running = nullptr;
Thread* current = nullptr;

class Launch final : public Surroundings {
 public:
  Launch(const GridSize& size, void (*body)(void*), void* context, const void* kernel,
         const void* arguments, size_t argument_bytes, Memory& memory)
      : size_(size),
        body_(body),
        context_(context),
        kernel_(kernel),
        arguments_(reinterpret_cast<uintptr_t>(arguments)),
        argument_bytes_(argument_bytes),
        memory_(memory) {}

  ~Launch() {
    for (const auto& block : blocks_) {
      for (const auto& thread : block->threads)
        if (thread->stack) stacks.give_back(thread->stack);
      free_shared(*block);
    }
  }

  void run() {
    check_size();
    seed_ = schedule.seed;
    random_.state = schedule.seed * 0x9e3779b97f4a7c15u + schedule.launches++;
    manner_ = random_.below(3);
    copy_delay_ = size_t(2) << random_.below(3) * 8;  // soon, late, when all else waits
    make_blocks();
    std::vector<Cluster*> order;
    for (const auto& cluster : clusters_) order.push_back(cluster.get());
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    // Blocks of a cooperative grid are all there at once. Of another grid no block may count on a
    // second one: they come one after the other.
    if (size_.cooperative) {
      for (Cluster* cluster : order) start(*cluster);
      loop();
    } else {
      for (Cluster* cluster : order) {
        start(*cluster);
        loop();
      }
    }
    if (!failure_.empty())
      throw std::runtime_error("the CPU runner of " + name() + ": " + failure_ +
                               "\n  in a grid of (" + text(size_.blocks) + ") blocks of " +
                               std::to_string(size_.threads) + " threads under seed " +
                               std::to_string(seed_));
  }

  const GridSize& size() const { return size_; }

  // Surroundings

  std::string describe(uint32_t actor) const override {
    const Thread& thread = *threads_[actor % threads_.size()];
    return std::string(actor >= threads_.size() ? "an asynchronous copy of " : "") +
           describe(thread);
  }
  bool within(Reach reach, unsigned block, unsigned other) const override {
    if (block == other || reach == Reach::device) return true;
    return reach == Reach::cluster && blocks_[block]->cluster == blocks_[other]->cluster;
  }
  [[noreturn]] void fail(const std::string& what) override {
    failure_ = what;
    if (!current) throw Stop{};
    swapcontext(&current->context, &host_);
    abort();  // nobody continues a fibre after a failure
  }

  // Memory, as kernels touch it

  void touch(const void* data, size_t bytes, bool is_write, const void* instruction) {
    const auto at = reinterpret_cast<uintptr_t>(data);
    if (at - reinterpret_cast<uintptr_t>(current->stack) < stack_bytes) return;
    if (!is_write && at - arguments_ < argument_bytes_) return;
    if (is_write)
      memory_.write(actor(), data, bytes, Reach::none, Place(instruction));
    else
      memory_.read(actor(), data, bytes, Reach::none, Place(instruction));
  }

  // Barriers

  void sync_threads(Site site) {
    meet(current->block->all, size_.threads, "sync_threads", site, true);
  }

  void sync_warp(Site site) { meet(warp(), warp_threads(), "sync_warp", site, true); }

  void sync_some(unsigned barrier, unsigned threads, Site site) {
    if (barrier < 1 || barrier > 15 || threads % warp_size || threads > size_.threads)
      fail("sync_some(" + std::to_string(barrier) + ", " + std::to_string(threads) + ") at " +
           at_site(site) + ": expected a barrier within 1..15 and whole warps of the block");
    meet(current->block->some[barrier], threads, "sync_some", site, true);
  }

  void grid_sync(Site site) {
    if (!size_.cooperative)
      fail("grid_sync at " + at_site(site) + " in a launch that is not cooperative");
    meet(grid_, static_cast<unsigned>(threads_.size()), "grid_sync", site, true);
  }

  void cluster_arrive(Site site) {
    pause(site);
    if (current->arrived_at_cluster)
      fail("second cluster_arrive without a cluster_wait\n  by " + describe(*current) + " at " +
           at_site(site));
    Cluster& cluster = *current->block->cluster;
    cluster.gathering.add(publish());
    current->arrived_at_cluster = true;
    current->cluster_phase = cluster.phase;
    if (++cluster.arrived < cluster.blocks.size() * size_.threads) return;
    cluster.passed_on = std::move(cluster.gathering);
    cluster.gathering = {};
    cluster.arrived = 0;
    ++cluster.phase;
    wake(cluster.waiting);
  }

  void cluster_wait(Site site) {
    pause(site);
    if (!current->arrived_at_cluster)
      fail("cluster_wait without a cluster_arrive\n  by " + describe(*current) + " at " +
           at_site(site));
    Cluster& cluster = *current->block->cluster;
    if (cluster.phase == current->cluster_phase) {
      cluster.waiting.push_back(current);
      wait("cluster_wait", site);
    }
    // Still this phase's: the next one cannot end before this thread arrives again.
    current->knows.add(cluster.passed_on);
    current->arrived_at_cluster = false;
  }

  // Warp operations: the last lane to come does it for all.

  template <class Act>
  void with_warp(const char* what, Site site, const Act& act) {
    Meeting& meeting = warp();
    meet(meeting, warp_threads(), what, site, false, [&] {
      std::vector<Thread*> lanes = meeting.waiting;
      std::sort(lanes.begin(), lanes.end(),
                [](const Thread* a, const Thread* b) { return a->index < b->index; });
      act(lanes);
    });
  }

  void need_whole_warp(const char* what, Site site) {
    if (warp_threads() != warp_size)
      fail(std::string(what) + " at " + at_site(site) + " in a warp of " +
           std::to_string(warp_threads()) + " threads");
  }

  uint64_t shuffle(Shuffle kind, uint64_t value, unsigned argument, Site site) {
    need_whole_warp("shuffle", site);
    current->argument = value;
    current->result = argument;
    with_warp("shuffle", site, [&](const std::vector<Thread*>& lanes) {
      for (unsigned i = 0; i < warp_size; ++i) {
        const auto n = static_cast<unsigned>(lanes[i]->result);
        const unsigned from = kind == Shuffle::indexed        ? n % warp_size
                              : kind == Shuffle::exclusive_or ? (i ^ n) % warp_size
                              : i + n < warp_size             ? i + n
                                                              : i;
        lanes[i]->result = lanes[from]->argument;
      }
    });
    return current->result;
  }

  unsigned ballot(bool value, Site site) {
    need_whole_warp("a vote", site);
    current->argument = value;
    with_warp("a vote", site, [](const std::vector<Thread*>& lanes) {
      uint64_t votes = 0;
      for (const Thread* lane : lanes) votes |= lane->argument << (lane->index % warp_size);
      for (Thread* lane : lanes) lane->result = votes;
    });
    return static_cast<unsigned>(current->result);
  }

  void mma(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
    need_whole_warp("mma", site);
    current->operands[0] = d;
    current->operands[1] = a;
    current->operands[2] = b;
    with_warp("mma", site, [type](const std::vector<Thread*>& lanes) { multiply(type, lanes); });
  }

  void load_matrix(uint32_t* registers, const void* row, bool transposed, Site site) {
    need_whole_warp("load_matrix", site);
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("load_matrix at " + at_site(site) + " of " + memory_.describe(row) +
           ", which is not a multiple of 16 bytes");
    memory_.read(actor(), row, 16, Reach::none, Place(site));
    uint16_t values[8];
    memcpy(values, row, 16);
    current->operands[0] = registers;
    current->operands[1] = values;
    with_warp("load_matrix", site, [transposed](const std::vector<Thread*>& lanes) {
      for (unsigned lane = 0; lane < warp_size; ++lane) {
        auto* to = static_cast<uint32_t*>(const_cast<void*>(lanes[lane]->operands[0]));
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
          const auto element = [&](unsigned r, unsigned c) -> uint32_t {
            return static_cast<const uint16_t*>(lanes[matrix * 8 + r]->operands[1])[c];
          };
          const unsigned group = lane / 4, pair = lane % 4 * 2;
          to[matrix] = transposed ? element(pair, group) | element(pair + 1, group) << 16
                                  : element(group, pair) | element(group, pair + 1) << 16;
        }
      }
    });
  }

  // Shared memory

  void* dynamic_shared() { return current->block->shared; }

  void* static_shared(Block& block, const void* key, size_t bytes, size_t alignment,
                      const char* name) {
    const auto found = block.arrays.find(key);
    if (found != block.arrays.end()) return found->second.data;
    char* data = allocate_shared(bytes, std::max(alignment, size_t(16)), block, name);
    block.arrays[key] = {data, bytes, name};
    return data;
  }

  // The PTX ISA leaves st.async undefined unless %cluster_nctarank > 1. It says nothing of mapa, but who
  // maps an address in a cluster of one has counted on another block.
  void need_cluster(const char* what, Site site) {
    if (size_.cluster < 2)
      fail(std::string(what) + " at " + at_site(site) +
           " in a cluster of one block: expected %cluster_nctarank > 1\n  by " +
           describe(*current));
  }

  void* remote_shared(const void* mine, unsigned rank, Site site) {
    need_cluster("remote_shared", site);
    Block& block = *current->block;
    const auto at = reinterpret_cast<uintptr_t>(mine);
    if (rank >= size_.cluster)
      fail("remote_shared at " + at_site(site) + ": rank " + std::to_string(rank) +
           " in a cluster of " + std::to_string(size_.cluster) + " blocks\n  by " +
           describe(*current));
    Block& other = *block.cluster->blocks[rank];
    if (!other.started)
      fail("remote_shared at " + at_site(site) + ": block (" + text(other.at) +
           ") may not have started yet; only a cluster_sync makes sure\n  by " +
           describe(*current));
    if (at - reinterpret_cast<uintptr_t>(block.shared) < size_.shared_bytes)
      return other.shared + (at - reinterpret_cast<uintptr_t>(block.shared));
    for (const auto& [key, array] : block.arrays)
      if (at - reinterpret_cast<uintptr_t>(array.data) < array.bytes)
        return static_cast<char*>(static_shared(other, key, array.bytes, 16, array.name)) +
               (at - reinterpret_cast<uintptr_t>(array.data));
    fail("remote_shared at " + at_site(site) + " of " + memory_.describe(mine) +
         ", which is not shared memory of this block\n  by " + describe(*current));
  }

  // Atomics

  void load(void* to, const void* from, size_t bytes, Reach reach, bool acquire, Site site) {
    pause(site);
    poll(from, site);
    check_aligned(from, bytes, "atomic load", site);
    memory_.read(actor(), from, bytes, reach, Place(site));
    memcpy(to, from, bytes);
    learn(flags_[reinterpret_cast<uintptr_t>(from)], reach, acquire);
  }

  void store(void* to, const void* from, size_t bytes, Reach reach, bool release, Site site) {
    pause(site);
    check_aligned(to, bytes, "atomic store", site);
    memory_.write(actor(), to, bytes, reach, Place(site));
    memcpy(to, from, bytes);
    Flag& flag = flags_[reinterpret_cast<uintptr_t>(to)];
    flag = {};
    release_to(flag, reach, release);
    wake_address(to);
  }

  uint64_t add(void* to, uint64_t value, size_t bytes, Reach reach, bool release, Site site) {
    pause(site);
    check_aligned(to, bytes, "atomic add", site);
    memory_.read(actor(), to, bytes, reach, Place(site));
    memory_.write(actor(), to, bytes, reach, Place(site));
    uint64_t before = 0;
    memcpy(&before, to, bytes);
    const uint64_t after = before + value;
    memcpy(to, &after, bytes);
    Flag& flag = flags_[reinterpret_cast<uintptr_t>(to)];
    learn(flag, reach, false);
    release_to(flag, reach, release);
    wake_address(to);
    return before;
  }

  void fence(Reach reach, Site site) {
    pause(site);
    current->knows.add(current->read_relaxed);
    current->fenced = publish();
    current->fence_reach = reach;
  }

  void wait_for_write(const void* flag, Site site) {
    current->address = reinterpret_cast<uintptr_t>(flag);
    sleepers_[current->address].push_back(current);
    wait("a flag", site);
  }

  // Transaction barriers

  void barrier_init(void* barrier, unsigned count, Site site) {
    pause(site);
    check_aligned(barrier, 8, "barrier", site);
    memory_.write(actor(), barrier, 8, Reach::none, Place(site));
    TransactionBarrier& state = barriers_[reinterpret_cast<uintptr_t>(barrier)];
    if (!state.waiting.empty()) fail("barrier_init at " + at_site(site) + " of a barrier in use");
    state = {};
    state.count = state.pending = count;
  }

  void barrier_arrive(void* barrier, unsigned expected, Site site) {
    pause(site);
    TransactionBarrier& state = find_barrier(barrier, actor(), Place(site));
    if (state.pending == 0)
      fail("more arrivals than the " + std::to_string(state.count) + " that " +
           memory_.describe(barrier) + " was made for\n  by " + describe(*current) + " at " +
           at_site(site));
    // Only threads of the barrier's own block wait on it, and every arrival reaches those.
    state.gathering.add(publish());
    state.bytes += expected;
    --state.pending;
    finish_phase(state);
  }

  void barrier_wait(void* barrier, unsigned parity, Site site) {
    pause(site);
    for (;;) {
      TransactionBarrier& state = find_barrier(barrier, actor(), Place(site));
      if ((state.phase & 1) != (parity & 1)) {
        current->knows.add(state.passed_on);
        return;
      }
      state.waiting.push_back(current);
      current->address = reinterpret_cast<uintptr_t>(barrier);
      wait("a barrier", site);
    }
  }

  // Asynchronous copies

  void copy_async(void* shared, const void* global, size_t bytes, Site site) {
    check_aligned(shared, bytes, "copy_async to shared memory", site);
    check_aligned(global, bytes, "copy_async from global memory", site);
    begin_copy(shared, global, bytes, nullptr, false, site);
    current->open_group.push_back(current->copies);
  }

  void copy_async_commit() {
    current->groups.push_back(std::move(current->open_group));
    current->open_group.clear();
  }

  void copy_async_wait(unsigned pending, Site site) {
    pause(site);
    while (current->groups.size() > pending) {
      for (const uint32_t time : current->groups.front()) {
        finish_copy(*current, time);
        current->knows.all = with(current->knows.all, agent(*current), time);
      }
      current->groups.pop_front();
    }
  }

  void bulk_copy(void* to, const void* from, size_t bytes, void* barrier, Site site) {
    if (bytes % 16)
      fail("bulk copy at " + at_site(site) + " of " + std::to_string(bytes) +
           " bytes, which is not a multiple of 16\n  by " + describe(*current));
    check_aligned(to, 16, "bulk copy to memory", site);
    check_aligned(from, 16, "bulk copy from memory", site);
    begin_copy(to, from, bytes, barrier, true, site);
  }

  void store_async(void* mine, const void* value, size_t bytes, void* barrier, unsigned rank,
                   Site site) {
    need_cluster("store_async", site);
    check_aligned(mine, bytes, "store_async", site);
    Copy& copy = begin_copy(remote_shared(mine, rank, site), nullptr, bytes,
                            remote_shared(barrier, rank, site), false, site);
    memcpy(copy.value, value, bytes);
  }

  void fence_async() {
    current->knows.fenced = with(current->knows.all, current->id, current->now++);
  }

 private:
  struct Stop {};

  // Set-up

  void check_size() {
    const auto refuse = [](const std::string& what) {
      throw std::runtime_error("the CPU runner: launch refused: " + what);
    };
    if (!size_.blocks.x || !size_.blocks.y || !size_.blocks.z || !size_.threads)
      refuse("an empty grid");
    if (size_.threads > 1024) refuse("more than 1024 threads in a block");
    if (size_.blocks.y > 65535 || size_.blocks.z > 65535)
      refuse("more than 65535 blocks along y or z");
    if (size_.shared_bytes > most_shared_bytes)
      refuse("more than 227 KB of shared memory in a block");
    if (!size_.cluster || size_.cluster > 16 || size_.blocks.x % size_.cluster)
      refuse("clusters of " + std::to_string(size_.cluster) + " blocks do not divide the grid");
  }

  void make_blocks() {
    const Position n = size_.blocks;
    for (unsigned z = 0; z < n.z; ++z)
      for (unsigned y = 0; y < n.y; ++y)
        for (unsigned x = 0; x < n.x; ++x) {
          auto block = std::make_unique<Block>();
          block->index = static_cast<unsigned>(blocks_.size());
          block->at = {x, y, z};
          block->rank = x % size_.cluster;
          if (block->rank == 0) clusters_.push_back(std::make_unique<Cluster>());
          block->cluster = clusters_.back().get();
          block->cluster->blocks.push_back(block.get());
          block->warps.resize((size_.threads + warp_size - 1) / warp_size);
          for (unsigned i = 0; i < size_.threads; ++i) {
            auto thread = std::make_unique<Thread>();
            thread->id = static_cast<uint32_t>(threads_.size());
            thread->index = i;
            thread->block = block.get();
            threads_.push_back(thread.get());
            block->threads.push_back(std::move(thread));
          }
          blocks_.push_back(std::move(block));
        }
  }

  void start(Cluster& cluster) {
    for (Block* block : cluster.blocks) {
      if (size_.shared_bytes)
        block->shared = allocate_shared(size_.shared_bytes, 1024, *block, "dynamic shared memory");
      for (const auto& thread : block->threads) ready_.push_back(thread.get());
      unfinished_ += size_.threads;
    }
  }

  char* allocate_shared(size_t bytes, size_t alignment, const Block& block, const char* name) {
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    auto* data = static_cast<char*>(aligned_alloc(alignment, rounded));
    memset(data, 0xff, rounded);
    memory_.add(data, bytes, std::string(name) + " of block (" + text(block.at) + ")", false);
    return data;
  }

  void free_shared(Block& block) {
    if (block.shared) {
      memory_.remove(block.shared, size_.shared_bytes);
      free(block.shared);
    }
    for (const auto& [key, array] : block.arrays) {
      memory_.remove(array.data, array.bytes);
      free(array.data);
    }
  }

  // Fibres

  void loop() {
    try {
      while (failure_.empty()) {
        if (!copies_.empty() && (ready_.empty() || random_.below(copy_delay_) == 0)) {
          perform_copy(random_.below(copies_.size()));
          continue;
        }
        if (ready_.empty()) break;
        resume(choose());
      }
      if (failure_.empty() && unfinished_) report_deadlock();
    } catch (const Stop&) {
    }
  }

  // Schedules come in three manners: any thread; the one that became ready last; preferably one of the
  // same block, so that blocks run far ahead of each other. Threads that only read flags wait for others.
  Thread* choose() {
    size_t i = random_.below(ready_.size());
    const size_t manner = idle_polls_ < 100 ? manner_ : 0;
    if (manner == 1 && random_.below(8)) i = ready_.size() - 1;
    if (manner == 2 && last_block_)
      for (unsigned tries = 0; tries < 8 && ready_[i]->block != last_block_; ++tries)
        i = random_.below(ready_.size());
    Thread* thread = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    last_block_ = thread->block;
    schedule.digest = schedule.digest * 0x100000001b3u + thread->id + 1;
    return thread;
  }

  void resume(Thread* thread) {
    if (!thread->stack) {
      thread->stack = stacks.take();
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack;
      thread->context.uc_stack.ss_size = stack_bytes;
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, &Launch::enter, 0);
      thread->block->started = true;
    }
    current = thread;
    swapcontext(&host_, &thread->context);
    current = nullptr;
    if (thread->state == Thread::State::finished) {
      stacks.give_back(thread->stack);
      thread->stack = nullptr;
    }
  }

  static void enter() {
    running->body_(running->context_);
    running->finish();
  }

  void finish() {
    Thread& thread = *current;
    idle_polls_ = 0;
    for (auto& group : thread.groups)
      for (const uint32_t time : group) finish_copy(thread, time);
    for (const uint32_t time : thread.open_group) finish_copy(thread, time);
    if (thread.arrived_at_cluster)
      fail("cluster_arrive without a cluster_wait\n  by " + describe(thread));
    thread.state = Thread::State::finished;
    --unfinished_;
    Block& block = *thread.block;
    if (++block.finished == block.threads.size()) {
      const std::string gone = "whose block has exited";
      memory_.forbid(block.shared, size_.shared_bytes, gone);
      for (const auto& [key, array] : block.arrays) memory_.forbid(array.data, array.bytes, gone);
    }
    swapcontext(&thread.context, &host_);
    abort();
  }

  // Lets others run first, if the schedule wants it.
  void pause(Site site) {
    current->site = site;
    ready_.push_back(current);
    swapcontext(&current->context, &host_);
  }

  void wait(const char* what, Site site) {
    current->state = Thread::State::waiting;
    current->waits = what;
    current->site = site;
    swapcontext(&current->context, &host_);
    current->waits = nullptr;
    current->address = 0;
  }

  void wake(Thread* thread) {
    if (thread->state != Thread::State::waiting) return;
    thread->state = Thread::State::ready;
    ready_.push_back(thread);
  }
  void wake(std::vector<Thread*>& waiting) {
    idle_polls_ = 0;
    for (Thread* thread : waiting) wake(thread);
    waiting.clear();
  }
  void wake_address(const void* address) {
    idle_polls_ = 0;
    const auto found = sleepers_.find(reinterpret_cast<uintptr_t>(address));
    if (found != sleepers_.end()) wake(found->second);
  }

  // A kernel that only reads flags, all of its threads, waits for one that nobody will set.
  void poll(const void* address, Site site) {
    if (++idle_polls_ > 1000 + 100 * uint64_t(unfinished_))
      fail("deadlock: nothing happens but reads of flags\n  " + describe(*current) + " reads " +
           memory_.describe(address) + " at " + at_site(site) + "\n" + who_waits());
  }

  // What a release publishes: all the thread knows, and its own accesses so far.
  Knowledge publish() {
    Knowledge known = current->knows;
    known.all = with(known.all, current->id, current->now);
    ++current->now;
    return known;
  }

  Actor actor() const {
    return {current->id, current->now, &current->knows.all, &current->knows.all,
            current->block->index};
  }

  template <class Act>
  void meet(Meeting& meeting, unsigned expected, const char* what, Site site, bool orders,
            const Act& act) {
    if (!meeting.waiting.empty() &&
        (meeting.site.line != site.line || strcmp(meeting.site.file, site.file) != 0))
      fail("divergent barrier: " + describe(*current) + " came to " + what + " at " +
           at_site(site) + "\n  while " + describe(*meeting.waiting[0]) + " waits at " +
           at_site(meeting.site));
    meeting.site = site;
    meeting.waiting.push_back(current);
    if (meeting.waiting.size() < expected) {
      wait(what, site);
      return;
    }
    if (orders) exchange_knowledge(meeting.waiting);
    act();
    Thread* const me = current;
    std::vector<Thread*> others;
    for (Thread* thread : meeting.waiting)
      if (thread != me) others.push_back(thread);
    meeting.waiting.clear();
    wake(others);
    pause(site);
  }
  void meet(Meeting& meeting, unsigned expected, const char* what, Site site, bool orders) {
    meet(meeting, expected, what, site, orders, [] {});
  }

  static void exchange_knowledge(const std::vector<Thread*>& threads) {
    Knowledge known;
    for (Thread* thread : threads) known.add(thread->knows);
    auto all = known.all ? *known.all : std::vector<uint32_t>{};
    for (Thread* thread : threads) {
      if (all.size() <= thread->id) all.resize(thread->id + 1);
      all[thread->id] = thread->now++;
    }
    known.all = std::make_shared<const std::vector<uint32_t>>(std::move(all));
    for (Thread* thread : threads) thread->knows = known;
  }

  Meeting& warp() { return current->block->warps[current->index / warp_size]; }
  unsigned warp_threads() const {
    return std::min(warp_size, size_.threads - current->index / warp_size * warp_size);
  }

  void check_aligned(const void* data, size_t bytes, const char* what, Site site) {
    if (reinterpret_cast<uintptr_t>(data) % bytes == 0) return;
    fail(std::string(what) + " at " + at_site(site) + ": " + memory_.describe(data) +
         " is not a multiple of " + std::to_string(bytes) + " bytes\n  by " + describe(*current));
  }

  void release_to(Flag& flag, Reach reach, bool release) {
    const bool fenced = current->fenced && !release;
    if (release)
      flag.released.add(publish());
    else if (fenced)
      flag.released.add(*current->fenced);
    if (fenced) reach = std::min(reach, current->fence_reach);
    flag.reach = flag.reach == Reach::none ? reach : std::min(flag.reach, reach);
    flag.block = current->block->index;
  }

  // A relaxed load makes known what was released once a fence follows it.
  void learn(const Flag& flag, Reach reach, bool acquire) {
    const unsigned mine = current->block->index;
    if (!within(flag.reach, flag.block, mine) || !within(reach, mine, flag.block)) return;
    (acquire ? current->knows : current->read_relaxed).add(flag.released);
  }

  TransactionBarrier& find_barrier(void* barrier, const Actor& by, Place place) {
    memory_.read(by, barrier, 8, Reach::device, place, false);
    const auto found = barriers_.find(reinterpret_cast<uintptr_t>(barrier));
    if (found == barriers_.end())
      fail("a barrier that nobody initialised, " + memory_.describe(barrier) + "\n  used by " +
           describe(by.id) + " at " + place.text());
    return found->second;
  }

  void finish_phase(TransactionBarrier& state) {
    idle_polls_ = 0;
    if (state.pending || state.bytes) return;
    state.passed_on = std::move(state.gathering);
    state.gathering = {};
    state.pending = state.count;
    ++state.phase;
    wake(state.waiting);
  }

  uint32_t agent(const Thread& thread) const {
    return static_cast<uint32_t>(threads_.size()) + thread.id;
  }

  Copy& begin_copy(void* to, const void* from, size_t bytes, void* barrier, bool fenced,
                   Site site) {
    pause(site);
    Knowledge knows = publish();
    // A thread's own fence covers what it did before; what it does later starts a new time.
    copies_.push_back(
        {to, from, {}, bytes, barrier, fenced, current, ++current->copies, std::move(knows), site});
    return copies_.back();
  }

  void finish_copy(const Thread& thread, uint32_t time) {
    for (size_t i = 0; i < copies_.size(); ++i)
      if (copies_[i].thread == &thread && copies_[i].time == time) return perform_copy(i);
  }

  void perform_copy(size_t index) {
    const Copy copy = std::move(copies_[index]);
    copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(index));
    idle_polls_ = 0;
    // What a bulk copy reads must have been fenced, and what it writes over known to be done with.
    const Clock& reads_after = copy.fenced ? copy.knows.fenced : copy.knows.all;
    const Actor by{agent(*copy.thread), copy.time, &reads_after, &copy.knows.all,
                   copy.thread->block->index};
    const Place place(copy.site);
    if (copy.from) {
      memory_.read(by, copy.from, copy.bytes, Reach::none, place, false);
      memory_.write(by, copy.to, copy.bytes, Reach::none, place);
      memory_.copy_written(copy.to, copy.from, copy.bytes);
      memmove(copy.to, copy.from, copy.bytes);
    } else {
      memory_.write(by, copy.to, copy.bytes, Reach::none, place);
      memcpy(copy.to, copy.value, copy.bytes);
    }
    if (!copy.barrier) return;
    TransactionBarrier& state = find_barrier(copy.barrier, by, place);
    // The completion is a release, of the copy and of what came before it was started.
    state.gathering.add(copy.knows);
    state.gathering.add(by.id, by.time);
    state.bytes -= static_cast<int64_t>(copy.bytes);
    finish_phase(state);
  }

  static void multiply(MatrixType type, const std::vector<Thread*>& lanes) {
    const int depth = type == MatrixType::tf32 ? 8 : 16;
    float a[16][16], b[16][8];
    const auto half = [type](uint32_t bits) {
      const auto low = static_cast<uint16_t>(bits);
      return type == MatrixType::bfloat16 ? widen(BFloat16{low}) : widen(Half{low});
    };
    const auto tf32 = [](uint32_t bits) {
      float value;
      bits &= ~0x1fffu;  // what the tensor core does not read
      memcpy(&value, &bits, 4);
      return value;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* a_registers = static_cast<const uint32_t*>(lanes[lane]->operands[1]);
      const auto* b_registers = static_cast<const uint32_t*>(lanes[lane]->operands[2]);
      const int group = lane / 4, within = lane % 4;
      if (type == MatrixType::tf32) {
        for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][within + i / 2 * 4] = tf32(a_registers[i]);
        for (int i = 0; i < 2; ++i) b[within + i * 4][group] = tf32(b_registers[i]);
      } else {
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 2; ++j)
            a[group + i % 2 * 8][within * 2 + j + i / 2 * 8] = half(a_registers[i] >> (16 * j));
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < 2; ++j)
            b[within * 2 + j + i * 8][group] = half(b_registers[i] >> (16 * j));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* d = static_cast<float*>(const_cast<void*>(lanes[lane]->operands[0]));
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < depth; ++k) d[i] += a[row][k] * b[k][column];
      }
    }
  }

  // Reports

  static std::string text(Position at) {
    return std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z);
  }

  std::string describe(const Thread& thread) const {
    return "thread " + std::to_string(thread.index) + " of block (" + text(thread.block->at) + ")";
  }

  std::string name() const { return Place(static_cast<const char*>(kernel_) + 1).text(); }

  void report_deadlock() {
    // A barrier that waits for a thread which has returned will wait for ever.
    const Thread* returned = nullptr;
    for (const Thread* thread : threads_)
      if (thread->state == Thread::State::finished && thread->block->finished &&
          thread->block->finished < thread->block->threads.size())
        returned = thread;
    bool at_barrier = false;
    for (const Thread* thread : threads_)
      at_barrier |= thread->state == Thread::State::waiting && !thread->address;
    fail((returned && at_barrier ? "divergent barrier: " + describe(*returned) +
                                       " has returned and others wait for it\n"
                                 : "deadlock: no thread can run\n") +
         who_waits());
  }

  // One line for every place, with how many wait there and the first of them.
  std::string who_waits() const {
    std::map<std::string, std::pair<unsigned, const Thread*>> places;
    unsigned returned = 0, rest = 0;
    for (const Thread* thread : threads_) {
      if (thread->state == Thread::State::finished) {
        ++returned;
      } else if (thread->waits) {
        std::string place = std::string(thread->waits) + " at " + at_site(thread->site);
        if (thread->address)
          place += ", " + memory_.describe(reinterpret_cast<void*>(thread->address)) +
                   barrier_text(thread->address);
        auto& [count, first] = places[place];
        if (!count++) first = thread;
      } else {
        ++rest;
      }
    }
    std::string report;
    for (const auto& [place, who] : places)
      report += "  " + std::to_string(who.first) + " wait for " + place + ": " +
                describe(*who.second) + (who.first > 1 ? " and others" : "") + "\n";
    return report + "  " + std::to_string(returned) + " have returned, " + std::to_string(rest) +
           " are running or not yet begun";
  }

  std::string barrier_text(uintptr_t address) const {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) return "";
    return " (phase " + std::to_string(found->second.phase) + ", " +
           std::to_string(found->second.pending) + " arrivals and " +
           std::to_string(found->second.bytes) + " bytes missing)";
  }

  const GridSize size_;
  void (*const body_)(void*);
  void* const context_;
  const void* const kernel_;
  const uintptr_t arguments_;
  const size_t argument_bytes_;
  Memory& memory_;

  uint64_t seed_ = 0, idle_polls_ = 0;
  Random random_;
  size_t manner_ = 0, copy_delay_ = 1;
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Thread*> threads_;
  std::vector<Thread*> ready_;
  unsigned unfinished_ = 0;
  Block* last_block_ = nullptr;
  Meeting grid_;
  std::map<uintptr_t, Flag> flags_;
  std::map<uintptr_t, TransactionBarrier> barriers_;
  std::map<uintptr_t, std::vector<Thread*>> sleepers_;
  std::vector<Copy> copies_;
  ucontext_t host_;
  std::string failure_;
};

Memory memory;

}  // namespace

// ---- host side

void launch(const GridSize& size, void (*body)(void*), void* context, const void* kernel,
            const void* arguments, size_t argument_bytes) {
  if (running) throw std::runtime_error("the CPU runner runs one launch at a time");
  Launch launch(size, body, context, kernel, arguments, argument_bytes, memory);
  memory.begin_launch(launch);
  running = &launch;
  try {
    launch.run();
  } catch (...) {
    running = nullptr;
    throw;
  }
  running = nullptr;
}

void declare(const Buffer& buffer) {
  memory.add(buffer.data, static_cast<size_t>(buffer.bytes), buffer.name, buffer.written != 0);
}

void declare(const Buffer* buffers, size_t count) {
  forget();
  for (size_t i = 0; i < count; ++i) declare(buffers[i]);
}

void forget() { memory.clear(); }

void host_wrote(const void* data, size_t bytes) { memory.set_written(data, bytes); }

void host_reads(const void* data, size_t bytes, const char* who) {
  for (size_t i = 0; i < bytes; ++i) {
    const char* at = static_cast<const char*>(data) + i;
    if (!memory.is_written(at, 1))
      throw std::runtime_error(std::string(who) + " reads " + memory.describe(at) +
                               ", which nothing has written");
  }
}

// ---- for the running thread

Position block_index() { return current->block->at; }
Position grid_size() { return running->size().blocks; }
unsigned thread_index() { return current->index; }
unsigned block_size() { return running->size().threads; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return running->size().cluster; }

void sync_threads(Site site) { running->sync_threads(site); }
void sync_warp(Site site) { running->sync_warp(site); }
void sync_some(unsigned barrier, unsigned threads, Site site) {
  running->sync_some(barrier, threads, site);
}
void cluster_arrive(Site site) { running->cluster_arrive(site); }
void cluster_wait(Site site) { running->cluster_wait(site); }
void grid_sync(Site site) { running->grid_sync(site); }

uint64_t shuffle(Shuffle kind, uint64_t value, unsigned argument, Site site) {
  return running->shuffle(kind, value, argument, site);
}
unsigned ballot(bool value, Site site) { return running->ballot(value, site); }
void mma(MatrixType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  running->mma(type, d, a, b, site);
}
void load_matrix(uint32_t* registers, const void* row, bool transposed, Site site) {
  running->load_matrix(registers, row, transposed, site);
}

void* dynamic_shared() { return running->dynamic_shared(); }
void* static_shared(const void* key, size_t bytes, size_t alignment, const char* name) {
  return running->static_shared(*current->block, key, bytes, alignment, name);
}
void* remote_shared(const void* mine, unsigned rank, Site site) {
  return running->remote_shared(mine, rank, site);
}

void load(void* to, const void* from, size_t bytes, Reach reach, bool acquire, Site site) {
  running->load(to, from, bytes, reach, acquire, site);
}
void store(void* to, const void* from, size_t bytes, Reach reach, bool release, Site site) {
  running->store(to, from, bytes, reach, release, site);
}
uint64_t add(void* to, uint64_t value, size_t bytes, Reach reach, bool release, Site site) {
  return running->add(to, value, bytes, reach, release, site);
}
void fence(Reach reach, Site site) { running->fence(reach, site); }
void wait_for_write(const void* flag, Site site) { running->wait_for_write(flag, site); }

void barrier_init(void* barrier, unsigned count, Site site) {
  running->barrier_init(barrier, count, site);
}
void barrier_arrive(void* barrier, unsigned expected_bytes, Site site) {
  running->barrier_arrive(barrier, expected_bytes, site);
}
void barrier_wait(void* barrier, unsigned parity, Site site) {
  running->barrier_wait(barrier, parity, site);
}

void copy_async(void* shared, const void* global, size_t bytes, Site site) {
  running->copy_async(shared, global, bytes, site);
}
void copy_async_commit() { running->copy_async_commit(); }
void copy_async_wait(unsigned pending, Site site) { running->copy_async_wait(pending, site); }
void bulk_copy(void* to, const void* from, size_t bytes, void* barrier, Site site) {
  running->bulk_copy(to, from, bytes, barrier, site);
}
void store_async(void* mine, const void* value, size_t bytes, void* barrier, unsigned rank,
                 Site site) {
  running->store_async(mine, value, bytes, barrier, rank, site);
}
void fence_async() { running->fence_async(); }

bool refusing = false;
bool refuses_to_gather() { return refusing; }

}  // namespace fused_rnn::cuda_on_cpu

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_on_cpu_refuse_to_gather(int refuse) { fused_rnn::cuda_on_cpu::refusing = refuse; }
EXPORT void cuda_on_cpu_seed(uint64_t seed) { fused_rnn::cuda_on_cpu::schedule = {seed, 0, 0}; }
EXPORT uint64_t cuda_on_cpu_schedule() { return fused_rnn::cuda_on_cpu::schedule.digest; }

// ---- what the compiler calls before every load and store of a kernel

namespace {

inline void touch(const void* data, size_t bytes, bool is_write, const void* instruction) {
  using namespace fused_rnn::cuda_on_cpu;
  if (current) running->touch(data, bytes, is_write, instruction);
}

}  // namespace

#define FUSED_RNN_TOUCH(kind, is_write, bytes)                 \
  extern "C" void __tsan_##kind##bytes(void* data) {           \
    touch(data, bytes, is_write, __builtin_return_address(0)); \
  }
FUSED_RNN_TOUCH(read, false, 1)
FUSED_RNN_TOUCH(read, false, 2)
FUSED_RNN_TOUCH(read, false, 4)
FUSED_RNN_TOUCH(read, false, 8)
FUSED_RNN_TOUCH(read, false, 16)
FUSED_RNN_TOUCH(write, true, 1)
FUSED_RNN_TOUCH(write, true, 2)
FUSED_RNN_TOUCH(write, true, 4)
FUSED_RNN_TOUCH(write, true, 8)
FUSED_RNN_TOUCH(write, true, 16)
FUSED_RNN_TOUCH(unaligned_read, false, 2)
FUSED_RNN_TOUCH(unaligned_read, false, 4)
FUSED_RNN_TOUCH(unaligned_read, false, 8)
FUSED_RNN_TOUCH(unaligned_read, false, 16)
FUSED_RNN_TOUCH(unaligned_write, true, 2)
FUSED_RNN_TOUCH(unaligned_write, true, 4)
FUSED_RNN_TOUCH(unaligned_write, true, 8)
FUSED_RNN_TOUCH(unaligned_write, true, 16)
extern "C" void __tsan_read_range(void* data, unsigned long bytes) {
  touch(data, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* data, unsigned long bytes) {
  touch(data, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
