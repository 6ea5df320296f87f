#include "simgpu/accelerator/process_group.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <cstdio>
#include <random>
#include <utility>

#include "simgpu/accelerator/device_allocator.h"
#include "simgpu/accelerator/guard.h"
#include "simgpu/core/engine.h"

namespace simgpu::accelerator {
namespace {

std::optional<DataType> TypeOf(c10::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DataType::kFloat32;
    case at::kDouble:
      return DataType::kFloat64;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBfloat16;
    case at::kLong:
      return DataType::kInt64;
    case at::kInt:
      return DataType::kInt32;
    case at::kChar:
      return DataType::kInt8;
    case at::kByte:
      return DataType::kUint8;
    default:
      return std::nullopt;
  }
}

Reduction ReductionOf(const c10d::ReduceOp& op) {
  switch (op) {
    case c10d::ReduceOp::SUM:
      return Reduction::kSum;
    case c10d::ReduceOp::AVG:
      return Reduction::kAverage;
    case c10d::ReduceOp::PRODUCT:
      return Reduction::kProduct;
    case c10d::ReduceOp::MAX:
      return Reduction::kMax;
    case c10d::ReduceOp::MIN:
      return Reduction::kMin;
    default:
      TORCH_CHECK(false, "the simulated accelerator has no such reduction");
  }
}

/// What a group has queued on its stream; it holds the tensors until somebody waits for it.
class Work final : public c10d::Work {
 public:
  Work(c10::Stream stream, std::vector<at::Tensor> outputs, std::vector<at::Tensor> touched)
      : stream_(stream), end_(kType), outputs_(std::move(outputs)), held_(std::move(touched)) {
    end_.record(stream);
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{stream.device()});
    const c10::StreamGuard guard(stream);
    future_->markCompleted(c10::IValue(outputs_));
  }
  ~Work() override {
    for (const at::Tensor& tensor : held_) {
      DeviceAllocator::Get().recordStream(tensor.storage().data_ptr(), stream_);
    }
  }

  bool isCompleted() override { return end_.query(); }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override {
    end_.block(CurrentStream(stream_.device_index()));
    held_.clear();
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  std::vector<at::Tensor> result() override { return outputs_; }

 private:
  c10::Stream stream_;
  c10::Event end_;
  std::vector<at::Tensor> outputs_, held_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

std::string NameFrom(c10d::Store& store, int rank) {
  if (rank == 0) {
    std::random_device random;
    char text[20];
    std::snprintf(text, sizeof text, "%08x%08x", random(), random());
    store.set("communicator", std::string(text));
  }
  return store.get_to_str("communicator");
}

}  // namespace

ProcessGroup::ProcessGroup(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size)
    : Backend(rank, size), id_(NameFrom(*store, rank)) {}

// ---- launching
// -----------------------------------------------------------------------------------

void ProcessGroup::Batch::Add(Collective kind, const at::Tensor& in, const at::Tensor& out,
                              int64_t count) {
  const at::Tensor& any = in.defined() ? in : out;
  Call call{kind};
  for (const at::Tensor& tensor : {in, out}) {
    TORCH_CHECK(!tensor.defined() || tensor.is_contiguous(),
                "the simulated accelerator's collectives take contiguous tensors");
    if (tensor.defined()) touched.push_back(tensor);
  }
  if (in.defined()) call.send = in.const_data_ptr();
  if (out.defined()) {
    call.receive = out.mutable_data_ptr();
    outputs.push_back(out);
  }
  // What is not known is sent as bytes; nobody reduces it.
  const std::optional<DataType> type = TypeOf(any.scalar_type());
  call.type = type.value_or(DataType::kUint8);
  call.count = static_cast<size_t>(count) * (type ? 1 : any.element_size());
  calls.push_back(call);
}

ProcessGroup::WorkPtr ProcessGroup::Launch(Batch batch) {
  if (coalesced_) {
    const auto append = [](auto& to, auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    append(coalesced_->calls, batch.calls);
    append(coalesced_->outputs, batch.outputs);
    append(coalesced_->touched, batch.touched);
    return nullptr;
  }
  const c10::Device device = batch.touched.at(0).device();
  const c10::DeviceGuard guard(device);
  if (!communicator_) {
    communicator_ = Communicator::Open(id_, getRank(), getSize(), device.index());
    stream_ = NewStream(device.index());
  }
  c10::Event ready(kType);
  ready.record(CurrentStream(device.index()));
  ready.block(*stream_);
  communicator_->Launch(IdOf(*stream_), std::move(batch.calls));
  return c10::make_intrusive<Work>(*stream_, std::move(batch.outputs), std::move(batch.touched));
}

void ProcessGroup::startCoalescing() { coalesced_.emplace(); }

ProcessGroup::WorkPtr ProcessGroup::endCoalescing() {
  std::optional<Batch> batch = std::exchange(coalesced_, std::nullopt);
  return batch && !batch->calls.empty() ? Launch(std::move(*batch)) : nullptr;
}

// ---- collectives
// ---------------------------------------------------------------------------------

ProcessGroup::WorkPtr ProcessGroup::_allgather_base(at::Tensor& out, at::Tensor& in,
                                                    const c10d::AllgatherOptions&) {
  Batch batch;
  batch.Add(Collective::kAllGather, in, out, in.numel());
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::allgather_into_tensor_coalesced(Tensors& outs, Tensors& ins,
                                                                    const c10d::AllgatherOptions&) {
  Batch batch;
  for (size_t i = 0; i < ins.size(); ++i) {
    batch.Add(Collective::kAllGather, ins[i], outs[i], ins[i].numel());
  }
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::allgather(std::vector<Tensors>& outs, Tensors& ins,
                                              const c10d::AllgatherOptions&) {
  const at::Tensor in = ins.at(0).contiguous();
  const at::Tensor all = at::empty({getSize(), in.numel()}, in.options());
  Batch batch;
  batch.Add(Collective::kAllGather, in, all, in.numel());
  Launch(std::move(batch))->wait();
  for (int64_t rank = 0; rank < getSize(); ++rank) {
    outs.at(0)[static_cast<size_t>(rank)].copy_(all[rank].view(in.sizes()));
  }
  return c10::make_intrusive<Work>(CurrentStream(in.device().index()), outs[0], Tensors{});
}

ProcessGroup::WorkPtr ProcessGroup::_reduce_scatter_base(
    at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& options) {
  Tensors outs{out}, ins{in};
  return reduce_scatter_tensor_coalesced(outs, ins, options);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter_tensor_coalesced(
    Tensors& outs, Tensors& ins, const c10d::ReduceScatterOptions& options) {
  Batch batch;
  for (size_t i = 0; i < ins.size(); ++i) {
    batch.Add(Collective::kReduceScatter, ins[i], outs[i], outs[i].numel());
    batch.calls.back().reduction = ReductionOf(options.reduceOp);
  }
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::allreduce(Tensors& tensors,
                                              const c10d::AllreduceOptions& options) {
  Batch batch;
  for (const at::Tensor& tensor : tensors) {
    batch.Add(Collective::kAllReduce, tensor, tensor, tensor.numel());
    batch.calls.back().reduction = ReductionOf(options.reduceOp);
  }
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::broadcast(Tensors& tensors,
                                              const c10d::BroadcastOptions& options) {
  Batch batch;
  batch.Add(Collective::kBroadcast, tensors.at(0), tensors[0], tensors[0].numel());
  batch.calls.back().peer = static_cast<int>(options.rootRank);
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::send(Tensors& tensors, int to, int) {
  Batch batch;
  batch.Add(Collective::kSend, tensors.at(0), {}, tensors[0].numel());
  batch.calls.back().peer = to;
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::recv(Tensors& tensors, int from, int) {
  Batch batch;
  batch.Add(Collective::kReceive, {}, tensors.at(0), tensors[0].numel());
  batch.calls.back().peer = from;
  return Launch(std::move(batch));
}

ProcessGroup::WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions&) {
  const auto options = at::TensorOptions(at::kInt).device(c10::Device(kType, CurrentDevice()));
  Tensors one{at::zeros({1}, options)};
  WorkPtr work = allreduce(one, {});
  work->wait();
  Engine::Get().SynchronizeStream(CurrentId());
  return work;
}

}  // namespace simgpu::accelerator
