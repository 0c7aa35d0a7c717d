#include "memory.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <tuple>
#include <unordered_map>

namespace fused_rnn::cuda_on_cpu {

// ---- clocks

Clock join(const Clock& a, const Clock& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const auto& longer = a->size() >= b->size() ? *a : *b;
  const auto& shorter = a->size() >= b->size() ? *b : *a;
  auto both = longer;
  for (size_t i = 0; i < shorter.size(); ++i) both[i] = std::max(both[i], shorter[i]);
  if (both == *a) return a;
  if (both == *b) return b;
  return std::make_shared<const std::vector<uint32_t>>(std::move(both));
}

Clock with(const Clock& clock, uint32_t actor, uint32_t time) {
  auto values = clock ? *clock : std::vector<uint32_t>{};
  if (values.size() <= actor) values.resize(actor + 1);
  values[actor] = std::max(values[actor], time);
  return std::make_shared<const std::vector<uint32_t>>(std::move(values));
}

void Knowledge::add(const Knowledge& other) {
  all = join(all, other.all);
  fenced = join(fenced, other.fenced);
}

void Knowledge::add(uint32_t actor, uint32_t time) {
  all = with(all, actor, time);
  fenced = with(fenced, actor, time);
}

// ---- places

namespace {

std::string one_line_of(FILE* pipe) {
  char buffer[1024];
  std::string line = fgets(buffer, sizeof(buffer), pipe) ? buffer : "";
  while (!line.empty() && line.back() == '\n') line.pop_back();
  return line;
}

// A function's own name: of "void a::(anonymous namespace)::f<a::B>(int)" it is f.
std::string short_name(const std::string& function) {
  std::string name;
  int depth = 0;
  for (size_t i = 0; i < function.size(); ++i) {
    if (function.compare(i, 21, "(anonymous namespace)") == 0) {
      i += 20;
      continue;
    }
    const char c = function[i];
    if (c == '(' && depth == 0) break;
    depth += (c == '<') - (c == '>');
    if (depth == 0 && c != '>') name = c == ' ' || c == ':' ? "" : name + c;
  }
  return name;
}

// The source lines of an instruction, the innermost inlined function first, as far as binutils and the
// debug information can tell.
std::string source_of(const void* instruction) {
  Dl_info info;
  if (!dladdr(instruction, &info)) return "an unknown place";
  const auto offset =
      reinterpret_cast<uintptr_t>(instruction) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  char command[2048];
  snprintf(command, sizeof(command), "addr2line -C -f -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           static_cast<size_t>(offset));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    for (std::string function; !(function = one_line_of(pipe)).empty();) {
      std::string line = one_line_of(pipe);
      line = line.substr(0, line.find(" ("));                          // "(discriminator 2)"
      if (line.empty() || line[0] == '?' || line[0] == '/') continue;  // the system's headers
      text += (text.empty() ? "" : ", called at ") +
              std::filesystem::path(line).lexically_normal().string() + " in " +
              short_name(function);
    }
    pclose(pipe);
  }
  if (!text.empty()) return text;
  snprintf(command, sizeof(command), "%s+0x%zx", info.dli_fname, static_cast<size_t>(offset));
  return command;
}

struct Earlier {
  bool operator()(const Site& a, const Site& b) const {
    return std::tie(a.file, a.line) < std::tie(b.file, b.line);
  }
};

// Whether the address belongs to a loaded program: constants of the kernels lie there.
bool is_program(uintptr_t address) {
  return dl_iterate_phdr(
             [](dl_phdr_info* info, size_t, void* wanted) {
               const uintptr_t at = *static_cast<uintptr_t*>(wanted) - info->dlpi_addr;
               for (int i = 0; i < info->dlpi_phnum; ++i) {
                 const auto& part = info->dlpi_phdr[i];
                 if (part.p_type == PT_LOAD && at - part.p_vaddr < part.p_memsz) return 1;
               }
               return 0;
             },
             &address) != 0;
}

}  // namespace

Place::Place(Site site) {
  static std::set<Site, Earlier> sites;
  value_ = reinterpret_cast<uintptr_t>(&*sites.insert(site).first) | site_bit;
}

std::string Place::text() const {
  if (value_ & site_bit) {
    const auto* site = reinterpret_cast<const Site*>(value_ & ~site_bit);
    return std::string(site->file) + ":" + std::to_string(site->line);
  }
  // The call returns to the instruction after it.
  return source_of(reinterpret_cast<const void*>(value_ - 1));
}

// ---- memory

struct Memory::Pages {
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> by_number;
};

void Memory::add(const void* data, size_t bytes, const std::string& name, bool written) {
  if (!pages_) pages_ = std::make_shared<Pages>();
  const auto begin = reinterpret_cast<uintptr_t>(data);
  regions_.push_back({name, "", begin});
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    auto& page = pages_->by_number[at / page_bytes];
    if (!page) page = std::make_unique<Page>();
    Cell& cell = page->cells[at % page_bytes];
    // The same memory may be given twice, as two arguments.
    if (!cell.region) cell.region = static_cast<uint32_t>(regions_.size() - 1);
    cell.written |= written;
  }
}

void Memory::remove(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = begin; at < begin + bytes; ++at)
    if (Cell* cell = find(at)) *cell = Cell{};
}

void Memory::forbid(const void* data, size_t bytes, const std::string& reason) {
  if (!bytes) return;
  if (Cell* cell = find(reinterpret_cast<uintptr_t>(data)))
    regions_[cell->region].forbidden = reason;
}

void Memory::clear() {
  regions_.resize(1);
  pages_.reset();
  last_page_ = nullptr;
  last_number_ = ~uintptr_t(0);
}

void Memory::fail(const std::string& what) const {
  around_->fail(what);
  abort();
}

Memory::Cell* Memory::find(uintptr_t address) const {
  const uintptr_t number = address / page_bytes;
  if (number != last_number_) {
    if (!pages_) return nullptr;
    const auto found = pages_->by_number.find(number);
    if (found == pages_->by_number.end()) return nullptr;
    last_number_ = number;
    last_page_ = found->second.get();
  }
  return &last_page_->cells[address % page_bytes];
}

void Memory::set_written(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = begin; at < begin + bytes; ++at)
    if (Cell* cell = find(at)) cell->written = true;
}

bool Memory::is_written(const void* data, size_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    const Cell* cell = find(at);
    if (!cell || !cell->written) return false;
  }
  return true;
}

void Memory::copy_written(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell* target = find(reinterpret_cast<uintptr_t>(to) + i);
    const Cell* source = find(reinterpret_cast<uintptr_t>(from) + i);
    if (target && source) target->written = source->written;
  }
}

std::string Memory::describe(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Cell* cell = find(at);
  if (!cell || !cell->region) return "memory that is no argument of the kernel";
  const Region& region = regions_[cell->region];
  return "'" + region.name + "' byte " + std::to_string(at - region.begin);
}

Memory::Cell& Memory::cell(uintptr_t address, const char* verb, const Actor& actor,
                           const Place& place, size_t bytes) {
  Cell* found = find(address);
  if (found && found->region) {
    const Region& region = regions_[found->region];
    if (!region.forbidden.empty())
      fail(std::string(verb) + " of " + describe(reinterpret_cast<void*>(address)) + ", " +
           region.forbidden + "\n  by " + around_->describe(actor.id) + " at " + place.text());
    if (found->launch != launch_) {
      found->launch = launch_;
      found->write.time = found->read.time = 0;
      found->more_reads.reset();
    }
    return *found;
  }
  // Where it would be, seen from the nearest buffer.
  std::string near;
  for (size_t step = 1; step <= 4096 && near.empty(); ++step)
    for (const uintptr_t other : {address - step, address + step}) {
      const Cell* neighbour = find(other);
      if (neighbour && neighbour->region) {
        near = ", " + std::to_string(step) + (other < address ? " past " : " before ") +
               describe(reinterpret_cast<void*>(other));
        break;
      }
    }
  fail("out of bounds: " + std::string(verb) + " of " + std::to_string(bytes) + " bytes" + near +
       "\n  by " + around_->describe(actor.id) + " at " + place.text());
}

namespace {

// Whether something orders `now` after `earlier`.
template <class Access>
bool follows(const Access& earlier, const Access& now, const Clock& known) {
  return earlier.time == 0 || earlier.actor == now.actor ||
         (known && earlier.actor < known->size() && (*known)[earlier.actor] >= earlier.time);
}

}  // namespace

bool Memory::may_follow(const Access& earlier, const Access& now, const Clock& known) const {
  if (follows(earlier, now, known)) return true;
  // Or both are atomic, and each reaches the other.
  return earlier.reach != Reach::none && now.reach != Reach::none &&
         around_->within(earlier.reach, earlier.block, now.block) &&
         around_->within(now.reach, now.block, earlier.block);
}

void Memory::race(uintptr_t address, const char* now, const Access& access, const char* before,
                  const Access& earlier) {
  fail("race on " + describe(reinterpret_cast<void*>(address)) + "\n  " + now + " by " +
       around_->describe(access.actor) + " at " + access.place.text() + "\n  " + before + " by " +
       around_->describe(earlier.actor) + " at " + earlier.place.text() +
       "\n  and nothing orders the two");
}

void Memory::read(const Actor& actor, const void* data, size_t bytes, Reach reach, Place place,
                  bool must_be_written) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const Access access{place, actor.id, actor.time, actor.block, reach};
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    if (!(find(at) && find(at)->region) && is_program(at)) return;
    Cell& cell = this->cell(at, "read", actor, place, bytes);
    if (!cell.written && must_be_written)
      fail("read of " + describe(reinterpret_cast<void*>(at)) +
           ", which nothing has written\n  by " + around_->describe(actor.id) + " at " +
           place.text());
    if (!may_follow(cell.write, access, *actor.reads_after))
      race(at, "read", access, "write", cell.write);
    // Reads that this one is known to follow need not be remembered.
    if (follows(cell.read, access, *actor.writes_after)) {
      cell.read = access;
    } else {
      if (!cell.more_reads) cell.more_reads = std::make_unique<std::vector<Access>>();
      auto& more = *cell.more_reads;
      const auto own = std::find_if(more.begin(), more.end(),
                                    [&](const Access& a) { return a.actor == access.actor; });
      if (own != more.end())
        *own = access;
      else
        more.push_back(access);
    }
  }
}

void Memory::write(const Actor& actor, const void* data, size_t bytes, Reach reach, Place place) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const Access access{place, actor.id, actor.time, actor.block, reach};
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    Cell& cell = this->cell(at, "write", actor, place, bytes);
    if (!may_follow(cell.write, access, *actor.writes_after))
      race(at, "write", access, "write", cell.write);
    if (!may_follow(cell.read, access, *actor.writes_after))
      race(at, "write", access, "read", cell.read);
    if (cell.more_reads)
      for (const Access& earlier : *cell.more_reads)
        if (!may_follow(earlier, access, *actor.writes_after))
          race(at, "write", access, "read", earlier);
    cell.write = access;
    cell.written = true;
    // After an atomic write there may be earlier atomic reads that a later plain write races with.
    if (reach == Reach::none) {
      cell.read.time = 0;
      cell.more_reads.reset();
    }
  }
}

}  // namespace fused_rnn::cuda_on_cpu
