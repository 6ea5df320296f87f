#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace simgpu {

/// Whether a process is gone, or has only its parent's last look before it.
bool HasEnded(int process);

/// What the processes of a job tell each other of their waiting, in memory that they share: enough
/// for each of them to see that some of them wait for each other for ever.
///
/// A process is blocked when its host waits for the device and nothing on the device can go on but
/// by meetings that others have not come to. It says which others (a set of places for each
/// meeting). The deadlocked are the largest set of blocked processes in which each one's every
/// meeting lacks one of the set; who has ended lacks for ever.
class Job {
 public:
  static constexpr int kPlaces = 64;  ///< processes that a job may have in its life
  static constexpr int kMeetings = 16;

  /// Maps the table of the job whose directory this is, and takes a place in it.
  explicit Job(const std::string& directory);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  int place() const { return place_; }

  /// This process is blocked; `missing`: for each meeting, the places that are not there. `words`:
  /// what a report shows of it.
  void SayBlocked(const std::vector<uint64_t>& missing, const std::string& words);
  void SayGoesOn();
  /// The deadlocked processes, if this is one of them. Two looks that are equal: none of them has
  /// gone on between.
  struct Look {
    uint64_t places = 0;
    std::array<uint64_t, kPlaces> turns{};
    bool operator==(const Look&) const = default;
  };
  Look LookForDeadlock() const;
  std::string WordsOf(uint64_t places) const;

 private:
  struct Place {
    std::atomic<int32_t> process;  // 0: never taken
    std::atomic<uint64_t> turn;    // odd: blocked; changes with each change
    std::atomic<uint32_t> meetings;
    std::array<std::atomic<uint64_t>, kMeetings> missing;
    std::array<char, 2048> words;
  };
  struct Table {
    std::atomic<int32_t> taken;
    std::array<Place, kPlaces> places;
  };

  Table* table_;
  int place_;
};

}  // namespace simgpu
