#include "hsdp/turn.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

namespace hsdp_ckpt::hsdp {

// The thread tells too: a backward within this one (reentrant checkpointing) is a graph task of its
// own, and runs in the thread of the one around it. Whatever else runs there (on CUDA other
// threads' graphs do) could not wait for its end anyway.
bool Turn::HasBackward() const {
  return holder_ == Holder::kBackward &&
         (thread_ == std::this_thread::get_id() ||
          graph_task_ == torch::autograd::get_current_graph_task_id());
}

// On CUDA the hooks of a backward within a forward run in autograd's thread, for which the
// forward's waits.
bool Turn::HasForward() const {
  const bool within =
      graph_task_ != -1 && graph_task_ == torch::autograd::get_current_graph_task_id();
  return holder_ == Holder::kForward && (within || thread_ == std::this_thread::get_id());
}

void Turn::Take(std::unique_lock<std::mutex>& lock, Holder holder) {
  TORCH_CHECK(holder_ != Holder::kReader || thread_ != std::this_thread::get_id(), who_(),
              "a wrapped module can't run inside of its own state_dict()");
  const bool reads = holder == Holder::kReader;
  readers_waiting_ += reads ? 1 : 0;
  given_.wait(lock, [&] { return holder_ == Holder::kNobody && (reads || readers_waiting_ == 0); });
  readers_waiting_ -= reads ? 1 : 0;
  holder_ = holder;
  thread_ = std::this_thread::get_id();
  graph_task_ = -1;
}

void Turn::Give(Holder holder, std::optional<int64_t> backward) {
  {
    const std::lock_guard lock(mutex_);
    if (holder_ != holder || backward.value_or(backwards_) != backwards_) return;
    holder_ = Holder::kNobody;
  }
  given_.notify_all();
}

void Turn::BeginForward() {
  std::unique_lock lock(mutex_);
  if (HasForward()) return;
  TORCH_CHECK(holder_ != Holder::kForward, who_(),
              "another thread of this process is in a forward of the same wrapped module. Run them "
              "one after the other: all ranks have to run the same forwards in the same order");
  Take(lock, Holder::kForward);
}

void Turn::EndForward() { Give(Holder::kForward); }

std::shared_ptr<void> Turn::BeginBackward() {
  std::unique_lock lock(mutex_);
  const int graph_task = torch::autograd::get_current_graph_task_id();
  // The kind alone tells: on CUDA the backward within a forward runs in autograd's thread.
  if (holder_ == Holder::kForward) {
    graph_task_ = graph_task;
    return nullptr;
  }
  Take(lock, Holder::kBackward);
  graph_task_ = graph_task;
  const int64_t number = ++backwards_;
  return {nullptr,
          [self = shared_from_this(), number](void*) { self->Give(Holder::kBackward, number); }};
}

void Turn::EndBackward() { Give(Holder::kBackward); }

ReadTurn Turn::BeginRead() {
  std::unique_lock lock(mutex_);
  return BeginRead(lock);
}

ReadTurn Turn::BeginReadIfQuiet() {
  std::unique_lock lock(mutex_);
  return Runs() ? ReadTurn::kBusy : BeginRead(lock);
}

ReadTurn Turn::BeginRead(std::unique_lock<std::mutex>& lock) {
  const bool reads = holder_ == Holder::kReader && thread_ == std::this_thread::get_id();
  if (reads || HasForward() || HasBackward()) return ReadTurn::kHeld;
  Take(lock, Holder::kReader);
  return ReadTurn::kTaken;
}

void Turn::EndRead() { Give(Holder::kReader); }

bool Turn::running_here() const {
  const std::lock_guard lock(mutex_);
  return HasForward() || HasBackward();
}

}  // namespace hsdp_ckpt::hsdp
