#pragma once

#include <ATen/ATen.h>

#include <memory>

namespace hsdp_ckpt::hsdp {

/// A device's side streams: one for gathers, one for reductions, shared by all units. On the CPU
/// everything here does nothing.
///
/// These rules make the order right; all waiting is done on the device, none on the host:
///  - Work on a side stream begins after what the compute stream had been given when `Enter` was
///    called.
///  - The compute stream goes on after a side stream's work only from `Join` on.
///  - A tensor that one stream allocated and another one uses is passed to `Uses` before it is
///    dropped, or kept until the first one has waited for the other in `Join`.
class DeviceStreams {
 public:
  enum class Stream { kGather, kReduce };

  /// A side stream is current as long as this lives.
  class Scope {
   public:
    virtual ~Scope() = default;
  };

  /// A moment: what a side stream had been given by then.
  class Mark {
   public:
    virtual ~Mark() = default;
  };

  virtual ~DeviceStreams() = default;

  /// The side stream waits for the current stream and becomes current. Null on the CPU.
  virtual std::unique_ptr<Scope> Enter(Stream) { return nullptr; }
  /// Marks the end of what has been given to the side stream so far. Null on the CPU.
  virtual std::unique_ptr<Mark> Record(Stream) { return nullptr; }
  /// The current stream waits for `mark`; null is nothing to wait for.
  virtual void Join(const Mark*) {}
  /// `tensor`'s memory is not given to others before the current stream has passed this point.
  virtual void Uses(const at::Tensor&) {}

  /// The streams of `device`, made at the first call. Throws c10::Error for a device that this
  /// build does not support.
  static std::shared_ptr<DeviceStreams> Of(at::Device device);
};

}  // namespace hsdp_ckpt::hsdp
