// What a plan has to know of the GPU at hand.
#include <map>
#include <mutex>

#include "device.cuh"
#include "plan.h"

namespace fused_rnn::cuda {
namespace {

KERNEL_OF(team_warps* warp_size)
void probe_kernel() {}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// How many clusters of `size` blocks, each with all the shared memory there is, run at once.
int clusters_of(int size, int shared_bytes) {
  const auto* kernel = reinterpret_cast<const void*>(probe_kernel);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(size);
  config.blockDim = dim3(team_warps * warp_size);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory of a kernel");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cluster size of a kernel");
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // a size that this GPU has not
    return 0;
  }
  return count;
}

Chip look_at(int device) {
  Chip chip{};
  chip.capability = attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                    attribute(cudaDevAttrComputeCapabilityMinor, device);
  chip.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  chip.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  chip.cooperative = attribute(cudaDevAttrCooperativeLaunch, device);
  chip.gigahertz = attribute(cudaDevAttrClockRate, device) * 1e-6;
  if (chip.capability >= 90)
    for (int i = 0; i < cluster_size_count; ++i)
      chip.clusters[i] = clusters_of(cluster_sizes[i], static_cast<int>(chip.shared_bytes));
  return chip;
}

}  // namespace

Chip chip_at_hand() {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second
                              : known.emplace(device, look_at(device)).first->second;
}

}  // namespace fused_rnn::cuda
