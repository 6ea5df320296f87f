#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace hsdp_ckpt::hsdp {

/// What a reader of the sharded parameters gets who asks for the turn.
enum class ReadTurn {
  kTaken,  ///< the turn, until EndRead
  kHeld,   ///< nothing new: this thread has the turn already, and whoever took it gives it back
  kBusy,   ///< nothing: a forward or a backward is under way
};

/// Says which thread may use the modules of one root: one that runs a forward, one that runs a
/// backward, or one that reads the sharded parameters (`state_dict()`, perhaps in another thread
/// than the one that trains). One at a time, the others wait; readers are not overtaken. All of it
/// is thread safe. GIL: it must not be held where a call may wait.
class Turn : public std::enable_shared_from_this<Turn> {
 public:
  /// `who`: how errors begin; names rank and module.
  explicit Turn(std::function<std::string()> who) : who_(std::move(who)) {}

  /// No effect inside of this thread's own forward. Throws c10::Error while another thread's
  /// forward is under way: ranks could not agree on the order of the two.
  void BeginForward();
  void EndForward();

  /// The turn lasts until EndBackward, or until what is returned is destroyed: a backward that
  /// raises is over then too. Null where a forward is under way, which calls autograd itself.
  std::shared_ptr<void> BeginBackward();
  void EndBackward();

  /// kTaken, or kHeld without effect. Another thread's forward or backward is waited for.
  ReadTurn BeginRead();
  /// The same, but no forward or backward is waited for, and this thread's own is none to read in:
  /// kBusy while one is under way in any thread.
  ReadTurn BeginReadIfQuiet();
  void EndRead();

  /// Whether a forward or a backward is under way in this thread. A backward is under way in the
  /// thread that it began in, and in those of autograd that work on its graph.
  bool running_here() const;

 private:
  enum class Holder { kNobody, kForward, kBackward, kReader };

  bool HasForward() const;
  bool HasBackward() const;
  bool Runs() const { return holder_ == Holder::kForward || holder_ == Holder::kBackward; }
  void Take(std::unique_lock<std::mutex>& lock, Holder holder);
  ReadTurn BeginRead(std::unique_lock<std::mutex>& lock);
  void Give(Holder holder, std::optional<int64_t> backward = std::nullopt);

  const std::function<std::string()> who_;
  mutable std::mutex mutex_;
  std::condition_variable given_;
  Holder holder_ = Holder::kNobody;
  std::thread::id thread_;  // of the holder; a backward's first one
  int graph_task_ = -1;     // of a backward, also of one within the forward that has the turn
  int64_t backwards_ = 0;
  int64_t readers_waiting_ = 0;
};

}  // namespace hsdp_ckpt::hsdp
