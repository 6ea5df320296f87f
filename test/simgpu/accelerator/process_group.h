#pragma once

#include <c10/core/Stream.h>

#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "simgpu/nccl/communicator.h"

namespace simgpu::accelerator {

/// Collectives in the order of a stream of the group's own, as most backends of devices have it:
/// that waits for the stream that is current in the call, and a stream that is current in `wait`
/// waits for it.
class ProcessGroup final : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  static constexpr const char* kName = "simccl";

  /// Waits for rank 0, which names the communicator.
  ProcessGroup(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size);

  const std::string getBackendName() const override { return kName; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

  WorkPtr _allgather_base(at::Tensor& out, at::Tensor& in,
                          const c10d::AllgatherOptions& options) override;
  WorkPtr allgather(std::vector<Tensors>& outs, Tensors& ins,
                    const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outs, Tensors& ins,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& out, at::Tensor& in,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outs, Tensors& ins,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr send(Tensors& tensors, int to, int tag) override;
  WorkPtr recv(Tensors& tensors, int from, int tag) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;

 private:
  /// What is launched together: the calls, what they write, and all that they touch.
  struct Batch {
    std::vector<Call> calls;
    Tensors outputs, touched;
    void Add(Collective kind, const at::Tensor& in, const at::Tensor& out, int64_t count);
  };

  /// None between startCoalescing and endCoalescing, which launches all.
  WorkPtr Launch(Batch batch);

  const std::string id_;
  std::shared_ptr<Communicator> communicator_;  // opened with the first call
  std::optional<c10::Stream> stream_;
  std::optional<Batch> coalesced_;
};

}  // namespace simgpu::accelerator
