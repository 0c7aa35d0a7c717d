// csrc/cpu/team.h under every way a thread pool may treat us (test_team.py). Part m of phase p adds up
// what all parts left at phase p-1; without the meeting between phases the sums come out wrong, and the
// thread sanitizer sees the race.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/team.h"

using fused_rnn::cpu::Part;
using fused_rnn::cpu::run_phases;

struct Trial {
  int members;
  int64_t phases;
  std::vector<Part> parts;
  std::vector<uint64_t> values[2];
  std::vector<int64_t> executions;

  Trial(int members, int64_t phases)
      : members(members), phases(phases), parts(members), executions(members * phases) {
    values[0].assign(members, 1);
    values[1].assign(members, 0);
  }

  void join(int me) {
    run_phases(parts.data(), members, me, phases, [&](int64_t phase, int part) {
      uint64_t sum = 0;
      for (uint64_t v : values[phase & 1]) sum = sum * 31 + v;
      values[(phase + 1) & 1][part] = sum + part;
      ++executions[phase * members + part];
    });
  }

  bool correct() const {
    for (int64_t n : executions)
      if (n != 1) return false;
    Trial serial(members, 0);
    std::vector<uint64_t> now(members, 1), next(members);
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int part = 0; part < members; ++part) {
        uint64_t sum = 0;
        for (uint64_t v : now) sum = sum * 31 + v;
        next[part] = sum + part;
      }
      now = next;
    }
    return values[phases & 1] == now;
  }
};

int main() {
  int failures = 0;
  const auto check = [&](const char* name, const Trial& trial) {
    if (trial.correct()) return;
    std::printf("wrong: %s\n", name);
    ++failures;
  };
  for (int members : {1, 2, 3, 5}) {
    Trial sequential(members, 50);  // one thread runs every chunk in turn
    for (int me = 0; me < members; ++me) sequential.join(me);
    check("sequential", sequential);

    Trial alone(members, 50);  // the pool gave one thread and one chunk
    alone.join(members - 1);
    check("alone", alone);

    Trial taken(members,
                50);  // the others came, and then the system gave their cores to someone else
    for (auto& part : taken.parts) part.attended = true;
    taken.join(0);
    check("taken", taken);

    for (int delay : {0, 1, 20}) {  // ms between arrivals
      Trial together(members, 400);
      std::vector<std::thread> threads;
      for (int me = 0; me < members; ++me)
        threads.emplace_back([&together, me, delay] {
          std::this_thread::sleep_for(std::chrono::milliseconds(delay * me));
          together.join(me);
        });
      for (auto& thread : threads) thread.join();
      check("together", together);
    }

    Trial few(members, 200);  // two threads share the chunks of all members
    std::thread first([&] {
      for (int me = 0; me < members; me += 2) few.join(me);
    });
    for (int me = 1; me < members; me += 2) few.join(me);
    first.join();
    check("few", few);
  }
  return failures;
}
