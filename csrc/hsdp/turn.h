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

/// Whose turn it is with the modules of one root: a forward's, a backward's, or somebody's who
/// reads the sharded parameters
/// (`state_dict()`, perhaps in another thread than the one that trains). One at a time, the others
/// wait; readers are not overtaken. All of it thread safe. GIL: must not be held where it may wait.
class Turn : public std::enable_shared_from_this<Turn> {
 public:
  /// `who`: how errors begin; names rank and module.
  explicit Turn(std::function<std::string()> who) : who_(std::move(who)) {}

  /// No effect inside of this thread's own forward. Throws c10::Error while another thread's
  /// forward is under way: ranks could not agree on the order of the two.
  void BeginForward();
  void EndForward();

  /// Until EndBackward, or until what is returned is destroyed: a backward that raises is over then
  /// too. Null where a forward is under way, which calls autograd itself.
  std::shared_ptr<void> BeginBackward();
  void EndBackward();

  /// False, without effect, where this thread has the turn already; true calls for EndRead. Another
  /// thread's forward or backward is waited for. With `only_if_quiet` nobody's is, not even this
  /// thread's own: null while one is under way.
  std::optional<bool> BeginRead(bool only_if_quiet = false);
  void EndRead();

  /// Whether a forward or a backward is under way in this thread. Of autograd's threads: in the one
  /// that it began in, and wherever that graph is worked on.
  bool running_here() const;

 private:
  enum class Holder { kNobody, kForward, kBackward, kReader };

  bool HasForward() const;
  bool HasBackward() const;
  bool Runs() const { return holder_ == Holder::kForward || holder_ == Holder::kBackward; }
  void Take(std::unique_lock<std::mutex>& lock, Holder holder);
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
