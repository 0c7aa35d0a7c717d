// Memory that a kernel is given, as told to the runner.
#pragma once

#include <cstdint>

struct Buffer {
  void* data;
  int64_t bytes;
  const char* name;
  int written;  // 1: its contents are there before the kernel runs
};
