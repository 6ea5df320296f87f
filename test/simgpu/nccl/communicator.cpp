#include "simgpu/nccl/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <iomanip>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include "simgpu/core/engine.h"
#include "simgpu/core/faults.h"
#include "simgpu/core/findings.h"

namespace simgpu {
namespace {

/// What precedes a rank's bytes of a call in its message: what has to be the same on all ranks.
struct Header {
  Collective kind;
  DataType type;
  Reduction reduction;
  int root;
  uint64_t count;
  double factor;  // each rank's own
  uint64_t bytes;
};

bool Agree(const Header& a, const Header& b) {
  return a.kind == b.kind && a.type == b.type && a.reduction == b.reduction && a.root == b.root &&
         a.count == b.count;
}

std::string Text(const Header& h) {
  return std::string(NameOf(h.kind)) + " of " + std::to_string(h.count) + " elements of " +
         NameOf(h.type);
}

std::string ByRank(const std::string& what, int rank) { return what + "_" + std::to_string(rank); }

int64_t NextNumber() {
  static std::atomic<int64_t> next = 0;
  return next++;
}

}  // namespace

/// The calls of a group on their way: this rank's message is out once its stream is there, and they
/// are over once all messages that they need are in.
class Communicator::Group final : public Meeting {
 public:
  Group(std::shared_ptr<Communicator> of, std::vector<Call> calls)
      : of_(std::move(of)), calls_(std::move(calls)), pairs_(calls_.size()) {
    for (size_t i = 0; i < calls_.size(); ++i) {
      if (!IsPointToPoint(calls_[i])) {
        collective_ = "g" + std::to_string(of_->groups_);
        continue;
      }
      const bool sends = calls_[i].kind == Collective::kSend;
      const int peer = calls_[i].peer;
      const uint64_t number = sends ? of_->sends_[peer]++ : of_->receives_[peer]++;
      std::ostringstream name;
      name << "p" << (sends ? of_->rank_ : peer) << "_" << (sends ? peer : of_->rank_) << "_"
           << number;
      pairs_[i] = name.str();
    }
    if (!collective_.empty()) ++of_->groups_;
    ++of_->under_way_;
  }
  ~Group() override { --of_->under_way_; }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  bool Poll() override {
    if (of_->aborted_) return true;
    if (!std::exchange(is_out_, true)) PutMessages();
    if (missing() != 0) return false;
    for (size_t i = 0; i < calls_.size(); ++i) {
      if (IsPointToPoint(calls_[i])) FinishPair(calls_[i], pairs_[i]);
    }
    if (!collective_.empty()) FinishCollectives();
    return true;
  }

  uint64_t missing() const override {
    uint64_t out = 0;
    for (const int rank : MissingRanks()) {
      out |= uint64_t{1} << of_->places_[static_cast<size_t>(rank)];
    }
    return out;
  }

  std::string absent() const override {
    std::string out;
    for (const int rank : MissingRanks()) {
      out += (out.empty() ? "rank " : ", ") + std::to_string(rank);
    }
    return out.empty() ? "nobody any more" : out;
  }

  int64_t communicator() const override { return of_->number_; }

 private:
  std::vector<int> MissingRanks() const {
    std::set<int> out;
    for (size_t i = 0; i < calls_.size(); ++i) {
      if (!IsPointToPoint(calls_[i])) continue;
      const bool sends = calls_[i].kind == Collective::kSend;
      if (!of_->mailbox_.Has(pairs_[i] + (sends ? "_there" : ""))) out.insert(calls_[i].peer);
    }
    for (int r = 0; !collective_.empty() && r < of_->size_; ++r) {
      if (!of_->mailbox_.Has(ByRank(collective_, r))) out.insert(r);
    }
    return {out.begin(), out.end()};
  }

  void PutMessages() {
    std::vector<char> message;
    const auto append = [&](const void* data, size_t bytes) {
      const auto* first = static_cast<const char*>(data);
      message.insert(message.end(), first, first + bytes);
    };
    for (size_t i = 0; i < calls_.size(); ++i) {
      const Call& call = calls_[i];
      const size_t bytes = SentBytes(call, of_->rank_, of_->size_);
      const auto* from = static_cast<const char*>(Engine::Get().Hands(call.send));
      if (call.kind == Collective::kSend) {
        of_->mailbox_.Put(pairs_[i], {from, from + bytes});
      } else if (call.kind == Collective::kReceive) {
        of_->mailbox_.Put(pairs_[i] + "_there", {});
      } else {
        const Header header{call.kind,  call.type,   call.reduction, call.peer,
                            call.count, call.factor, bytes};
        append(&header, sizeof header);
        append(from, bytes);
      }
    }
    if (collective_.empty()) return;
    of_->mailbox_.Put(ByRank(collective_, of_->rank_), message);
    of_->own_messages_.push_back(ByRank(collective_, of_->rank_));
  }

  void FinishPair(const Call& call, const std::string& name) {
    if (call.kind == Collective::kSend) {
      of_->mailbox_.Remove(name + "_there");
      return;
    }
    const std::vector<char> bytes = of_->mailbox_.Read(name);
    of_->mailbox_.Remove(name);
    const size_t wanted = ReceivedBytes(call, of_->rank_, of_->size_);
    if (bytes.size() != wanted) {
      Differ("rank " + std::to_string(call.peer) + " sends " + std::to_string(bytes.size()) +
             " bytes, rank " + std::to_string(of_->rank_) + " receives " + std::to_string(wanted));
    }
    std::ranges::copy(bytes, static_cast<char*>(Engine::Get().Hands(call.receive)));
  }

  void FinishCollectives() {
    std::vector<std::vector<char>> messages;
    for (int r = 0; r < of_->size_; ++r) {
      messages.push_back(of_->mailbox_.Read(ByRank(collective_, r)));
    }
    std::vector<size_t> at(messages.size());
    for (const Call& call : calls_) {
      if (IsPointToPoint(call)) continue;
      std::vector<const char*> inputs;
      std::vector<double> factors;
      for (size_t r = 0; r < messages.size(); ++r) {
        const Header header = Next(call, messages[r], at[r], static_cast<int>(r));
        inputs.push_back(messages[r].data() + at[r]);
        at[r] += header.bytes;
        const double average = 1.0 / of_->size_;
        factors.push_back(call.reduction == Reduction::kAverage ? average : header.factor);
      }
      Compute(call, inputs, factors, of_->rank_,
              static_cast<char*>(Engine::Get().Hands(call.receive)));
    }
    // All have put out this one, so all have read the ones before.
    while (of_->own_messages_.size() > 1) {
      of_->mailbox_.Remove(of_->own_messages_.front());
      of_->own_messages_.pop_front();
    }
  }

  /// The header of a rank's next call, which has to be the one that this rank makes.
  Header Next(const Call& call, const std::vector<char>& message, size_t& at, int rank) const {
    const Header mine{call.kind, call.type, call.reduction, call.peer, call.count, call.factor, 0};
    const std::string here = "rank " + std::to_string(of_->rank_) + " " + Text(mine) + ", rank " +
                             std::to_string(rank) + " ";
    if (at + sizeof(Header) > message.size()) Differ(here + "no more calls in this group");
    Header header;
    std::memcpy(&header, message.data() + at, sizeof header);
    at += sizeof header;
    if (!Agree(header, mine)) Differ(here + Text(header));
    return header;
  }

  [[noreturn]] void Differ(const std::string& how) const {
    Findings::Get().Add(Fault::kMismatch, how, of_->Name() + ": " + how);
    PrintPythonStacks();
    std::_Exit(kMismatchExit);
  }

  const std::shared_ptr<Communicator> of_;
  const std::vector<Call> calls_;
  std::vector<std::string> pairs_;  // names of messages, by call
  std::string collective_;          // name of all ranks' messages; empty: none of the calls is one
  bool is_out_ = false;
};

Communicator::Communicator(std::string id, int rank, int size, int device)
    : id_(std::move(id)),
      rank_(rank),
      size_(size),
      device_(device),
      number_(NextNumber()),
      mailbox_(Settings::Get().directory, id_) {}

std::shared_ptr<Communicator> Communicator::Open(const std::string& id, int rank, int size,
                                                 int device) {
  std::shared_ptr<Communicator> made(new Communicator(id, rank, size, device));
  const std::string mine = std::to_string(Engine::Get().place()) + " " + std::to_string(getpid());
  for (const std::string& theirs : made->Exchange("open", mine)) {
    std::istringstream text(theirs);
    int place = 0, process = 0;
    text >> place >> process;
    made->places_.push_back(place);
    made->processes_.push_back(process);
  }
  return made;
}

std::string Communicator::Name() const {
  std::ostringstream out;
  out << "communicator " << std::hex << std::setfill('0') << std::setw(4)
      << (std::hash<std::string>{}(id_) & 0xffff) << std::dec << ", rank " << rank_ << " of "
      << size_;
  return out.str();
}

std::vector<std::string> Communicator::Exchange(const std::string& what, const std::string& mine) {
  mailbox_.Put(ByRank(what, rank_), {mine.begin(), mine.end()});
  const auto limit = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  std::vector<std::string> all;
  for (int r = 0; r < size_; ++r) {
    while (!mailbox_.Has(ByRank(what, r))) {
      if (std::chrono::steady_clock::now() > limit) {
        throw std::runtime_error("simgpu: rank " + std::to_string(r) + " has not come to " + what +
                                 " of communicator " + id_ + " within a minute");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    const std::vector<char> bytes = mailbox_.Read(ByRank(what, r));
    all.emplace_back(bytes.begin(), bytes.end());
  }
  return all;
}

void Communicator::Launch(int stream, std::vector<Call> calls) {
  Operation operation;
  operation.kind = Kind::kCollective;
  operation.name = "nccl";
  for (const Call& call : calls) {
    operation.accesses.push_back(Reads(call.send, SentBytes(call, rank_, size_)));
    operation.accesses.push_back(Writes(call.receive, ReceivedBytes(call, rank_, size_)));
    if (operation.name.size() < 60) operation.name += std::string(" ") + NameOf(call.kind);
  }
  operation.name += " of " + Name();
  operation.meeting = std::make_shared<Group>(shared_from_this(), std::move(calls));
  Engine::Get().Issue(stream, std::move(operation));
}

std::shared_ptr<Communicator> Communicator::Split(int color, int key) {
  const std::string what = "split" + std::to_string(splits_++);
  std::vector<std::pair<int, int>> members;  // key, rank
  const auto all = Exchange(what, std::to_string(color) + " " + std::to_string(key));
  for (int r = 0; r < size_; ++r) {
    std::istringstream text(all[static_cast<size_t>(r)]);
    int their_color = 0, their_key = 0;
    text >> their_color >> their_key;
    if (their_color == color) members.emplace_back(their_key, r);
  }
  if (color < 0) return nullptr;
  std::sort(members.begin(), members.end());
  const auto me = std::find_if(members.begin(), members.end(),
                               [&](const auto& member) { return member.second == rank_; });
  return Open(id_ + what + "c" + std::to_string(color), static_cast<int>(me - members.begin()),
              static_cast<int>(members.size()), device_);
}

void Communicator::Abort() {
  if (!aborted_.exchange(true)) mailbox_.Put(ByRank("aborted", rank_), {});
}

int Communicator::lost_rank() const {
  if (under_way_ == 0) return -1;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    if (HasEnded(processes_[static_cast<size_t>(r)]) || mailbox_.Has(ByRank("aborted", r)))
      return r;
  }
  return -1;
}

}  // namespace simgpu
