#include "hsdp/device_streams.h"

#include <map>
#include <mutex>
#include <utility>

#ifdef HSDP_CKPT_WITH_CUDA
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hsdp_ckpt::hsdp {

#ifdef HSDP_CKPT_WITH_CUDA
namespace {

class CudaScope final : public DeviceStreams::Scope {
 public:
  explicit CudaScope(const c10::cuda::CUDAStream& stream) : guard_(stream) {}

 private:
  c10::cuda::CUDAStreamGuard guard_;
};

class CudaMark final : public DeviceStreams::Mark {
 public:
  at::cuda::CUDAEvent event;  // timing off: the default, and the cheap kind
};

class CudaStreams final : public DeviceStreams {
 public:
  // The priority is high, as a collective that waits behind compute kernels delays the kernels that
  // wait for it.
  explicit CudaStreams(at::Device device)
      : gather_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
        reduce_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())) {}

  std::unique_ptr<Scope> Enter(Stream which) override {
    const c10::cuda::CUDAStream& side = which == Stream::kGather ? gather_ : reduce_;
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(side.device_index());
    if (current != side) {
      // An event that is destroyed while a stream still waits for it is released by the driver when
      // the wait is over.
      at::cuda::CUDAEvent event;
      event.record(current);
      event.block(side);
    }
    return std::make_unique<CudaScope>(side);
  }

  std::unique_ptr<Mark> Record(Stream which) override {
    auto mark = std::make_unique<CudaMark>();
    mark->event.record(which == Stream::kGather ? gather_ : reduce_);
    return mark;
  }

  void Join(const Mark* mark) override {
    if (mark == nullptr) return;
    const auto& event = static_cast<const CudaMark*>(mark)->event;
    const_cast<at::cuda::CUDAEvent&>(event).block(
        c10::cuda::getCurrentCUDAStream(gather_.device_index()));
  }

  void Uses(const at::Tensor& tensor) override {
    c10::cuda::CUDACachingAllocator::recordStream(
        tensor.storage().data_ptr(), c10::cuda::getCurrentCUDAStream(gather_.device_index()));
  }

 private:
  c10::cuda::CUDAStream gather_, reduce_;
};

}  // namespace
#endif

std::shared_ptr<DeviceStreams> DeviceStreams::Of(at::Device device) {
  // A process has one pair of streams a device. The map is never destroyed: at exit the CUDA driver
  // may be gone before a static would be.
  static auto& made = *new std::map<at::Device, std::shared_ptr<DeviceStreams>,
                                    bool (*)(const at::Device&, const at::Device&)>(
      [](const at::Device& a, const at::Device& b) {
        return std::pair(a.type(), a.index()) < std::pair(b.type(), b.index());
      });
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& streams = made[device];
  if (streams) return streams;
  if (device.is_cpu()) return streams = std::make_shared<DeviceStreams>();
#ifdef HSDP_CKPT_WITH_CUDA
  if (device.is_cuda()) return streams = std::make_shared<CudaStreams>(device);
  TORCH_CHECK(false, "torch_hsdp_ckpt shards parameters on CPU and CUDA devices, not on ", device,
              ": move the module first");
#else
  TORCH_CHECK(false,
              "this build of torch_hsdp_ckpt supports CPU tensors only and the parameters are on ",
              device, ": build it again where a CUDA toolkit is found");
#endif
}

}  // namespace hsdp_ckpt::hsdp
