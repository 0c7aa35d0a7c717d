// What kernels may touch, byte by byte: whether it was written, who touched it last, and whether anything
// orders the next access after that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runner.h"

namespace fused_rnn::cuda_on_cpu {

// A vector clock: for every actor the time up to which its accesses are known. Actors are the threads of
// the launch and, beside each, the asynchronous copies that it started. Shared, since after a barrier
// all who met there know the same.
using Clock = std::shared_ptr<const std::vector<uint32_t>>;

Clock join(const Clock& a, const Clock& b);
Clock with(const Clock& clock, uint32_t actor, uint32_t time);

struct Knowledge {
  Clock all;
  Clock fenced;  // the part that asynchronous copies, which go another way to memory, know too

  void add(const Knowledge& other);
  void add(uint32_t actor, uint32_t time);
};

// Where an access stands in the source: an instruction's address or a Site.
class Place {
 public:
  Place() = default;
  explicit Place(const void* instruction) : value_(reinterpret_cast<uintptr_t>(instruction)) {}
  explicit Place(Site site);
  std::string text() const;

 private:
  static constexpr uint64_t site_bit = uint64_t(1) << 63;
  uint64_t value_ = 0;
};

// Who touches memory, and what it knows then.
struct Actor {
  uint32_t id;
  uint32_t time;
  const Clock* reads_after;   // writes known to those that read
  const Clock* writes_after;  // accesses known to those that write
  unsigned block;
};

// What is known of the launch, for reports and scopes.
struct Surroundings {
  virtual std::string describe(uint32_t actor) const = 0;
  virtual bool within(Reach reach, unsigned block, unsigned other) const = 0;
  virtual void fail(const std::string& what) = 0;  // does not return

 protected:
  ~Surroundings() = default;
};

class Memory {
 public:
  // Forgets who touched what; what is written stays written.
  void begin_launch(Surroundings& around) {
    around_ = &around;
    ++launch_;
  }

  void add(const void* data, size_t bytes, const std::string& name, bool written);
  void remove(const void* data, size_t bytes);
  // From now on an access to any of it fails for this reason; an empty one lifts that.
  void forbid(const void* data, size_t bytes, const std::string& reason);
  void clear();

  void set_written(const void* data, size_t bytes);
  bool is_written(const void* data, size_t bytes) const;
  void copy_written(void* to, const void* from, size_t bytes);
  std::string describe(const void* address) const;

  void read(const Actor& actor, const void* data, size_t bytes, Reach reach, Place place,
            bool must_be_written = true);
  void write(const Actor& actor, const void* data, size_t bytes, Reach reach, Place place);

 private:
  struct Access {
    Place place;
    uint32_t actor = 0, time = 0;  // time 0: there was none
    unsigned block = 0;
    Reach reach = Reach::none;
  };
  struct Cell {
    uint32_t launch = 0;
    uint32_t region = 0;  // 0: nothing may be there
    bool written = false;
    Access write, read;
    std::unique_ptr<std::vector<Access>> more_reads;
  };
  struct Region {
    std::string name, forbidden;
    uintptr_t begin;
  };
  static constexpr size_t page_bytes = 256;
  struct Page {
    Cell cells[page_bytes];
  };

  Cell* find(uintptr_t address) const;
  Cell& cell(uintptr_t address, const char* verb, const Actor& actor, const Place& place,
             size_t bytes);
  bool may_follow(const Access& earlier, const Access& now, const Clock& known) const;
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void race(uintptr_t address, const char* now, const Access& access,
                         const char* before, const Access& earlier);

  Surroundings* around_ = nullptr;
  uint32_t launch_ = 1;
  std::vector<Region> regions_{Region{}};
  // Open addressing would be faster; a page is looked up once for every run of accesses to it.
  struct Pages;
  std::shared_ptr<Pages> pages_;
  mutable uintptr_t last_number_ = ~uintptr_t(0);
  mutable Page* last_page_ = nullptr;
};

}  // namespace fused_rnn::cuda_on_cpu
