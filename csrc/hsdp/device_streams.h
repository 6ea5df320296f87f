#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <source_location>
#include <vector>

#include "hsdp/pending_works.h"

namespace hsdp_ckpt::hsdp {

/// A device's side streams: one for gathers, one for reductions, shared by all units. Any device
/// whose backend implements c10's streams and events (c10::impl::DeviceGuardImplInterface) has
/// them; on the CPU everything here does nothing.
///
/// The *compute stream* is the one that is current where a unit is used. Three rules make the order
/// right; all waiting is done on the device, and on the host only for what that is to read:
///  - All memory is the compute stream's: it is allocated and freed there.
///  - A side stream's work begins after what the compute stream had been given when `Enter` was
///    called.
///  - The compute stream goes on with what a side stream has written, and frees what that has used,
///    only after a `Join`. What goes out of our hands before that is passed to `Uses`.
///
/// docs/design/schedule.md has the table of all calls with what each is for. Tests leave them out
/// one at a time (base/left_out.h): therefore each knows the function that it stands in.
///
/// Thread safety: any thread may call; a Mark and a Held are one thread's at a time.
class DeviceStreams {
 public:
  enum class Side { kGather, kReduce };
  using Place = std::source_location;

  /// A moment: what a side stream had been given by then.
  class Mark {
    friend DeviceStreams;
    std::vector<WorkPtr> works_;       // waited for instead of the event
    std::optional<c10::Event> event_;  // kept, to be recorded again
    std::optional<Side> side_;         // absent: unset
    uint64_t given_ = 0;               // SideStream::given by then
  };

  /// Tensors that a side stream uses up to a moment.
  class Held {
    friend DeviceStreams;
    std::vector<at::Tensor> tensors_;
    Mark used_;
  };

  /// While it lives, a side stream is the current one.
  class Scope;

  /// Without side streams, as on the CPU.
  DeviceStreams() = default;
  /// Throws c10::Error for a device without streams of c10's kind.
  explicit DeviceStreams(at::Device device);

  /// The streams of `device`, made at the first call. Throws as the constructor does.
  static std::shared_ptr<DeviceStreams> Of(at::Device device);

  /// The side stream waits for the current stream, and is current as long as the result lives.
  Scope Enter(Side side, const Place& place = Place::current());
  /// The side stream is current as long as the result lives, and waits for nothing: for what needs
  /// only what the last Enter has waited for.
  Scope Within(Side side, const Place& place = Place::current());
  /// Sets `mark` to what has been given to the side stream so far. `works`: of the last operations
  /// there, if their backend gives any: waiting for them costs no event of our own.
  void Record(Side side, Mark& mark, std::vector<WorkPtr> works = {});
  /// The current stream waits for `mark`, if that is set and has not been waited for, and unsets
  /// it.
  void Join(Mark& mark, const Place& place = Place::current());
  /// The current stream waits for all that has been given to the side stream.
  void Join(Side side, const Place& place = Place::current());
  /// The host waits for all that has been given to the side stream.
  void AwaitOnHost(Side side, const Place& place = Place::current());
  /// `tensor`'s memory is not given to others before the current stream has passed this point.
  void Uses(const at::Tensor& tensor, const Place& place = Place::current());
  /// Adds `tensors` to `held`, all of which the side stream uses up to now at the latest. `works`:
  /// as for Record.
  void Hold(Side side, std::vector<at::Tensor> tensors, Held& held, std::vector<WorkPtr> works,
            const Place& place = Place::current());
  /// The current stream waits until what is held has been used, and gets the memory.
  void Release(Held& held, const Place& place = Place::current());

 private:
  struct SideStream {
    explicit SideStream(c10::Stream side);

    c10::Stream stream;
    c10::Event event;  // recorded anew for every wait
    uint64_t given =
        0;  // grows when something has been given to it: at marks, and at ends of scopes
    std::map<c10::StreamId, uint64_t> joined;  // by stream: what it has waited for of that
  };

  void Given(Side side);
  SideStream& StreamOf(Side side) { return sides_[static_cast<size_t>(side)]; }
  c10::Stream Current() const;

  std::mutex mutex_;
  std::vector<SideStream> sides_;  // empty without side streams
};

class DeviceStreams::Scope {
 public:
  Scope() = default;
  Scope(DeviceStreams& streams, Side side)
      : streams_(&streams), side_(side), current_(streams.StreamOf(side).stream) {}
  ~Scope() {
    if (streams_ != nullptr) streams_->Given(side_);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  DeviceStreams* streams_ = nullptr;
  Side side_{};
  c10::OptionalStreamGuard current_;
};

}  // namespace hsdp_ckpt::hsdp
