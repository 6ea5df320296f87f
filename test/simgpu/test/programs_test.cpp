// Programs that are wrong, and the same ones mended: with every seed the simulator finds what is
// wrong with the first, and nothing with the second.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <thread>

#include "simgpu/core/engine.h"
#include "simgpu/core/faults.h"
#include "simgpu/core/findings.h"
#include "simgpu/nccl/communicator.h"
#include "simgpu/test/ranks.h"

namespace simgpu {
namespace {

using ::testing::HasSubstr;
using ::testing::Range;

constexpr size_t kBytes = 4096;
constexpr size_t kFloats = kBytes / sizeof(float);

/// A kernel that adds one to every float, and one that copies.
void AddOne(int stream, void* data) {
  Operation kernel;
  kernel.name = "add one";
  kernel.accesses = {Reads(data, kBytes), Writes(data, kBytes)};
  kernel.run = [data] {
    auto* floats = static_cast<float*>(Engine::Get().Hands(data));
    for (size_t i = 0; i < kFloats; ++i) floats[i] += 1;
  };
  Engine::Get().Issue(stream, std::move(kernel));
}

void Copy(int stream, const void* from, void* to) {
  Operation copy;
  copy.kind = Kind::kCopy;
  copy.name = "copy";
  copy.accesses = {Reads(from, kBytes), Writes(to, kBytes)};
  copy.run = [=] { std::memcpy(Engine::Get().Hands(to), Engine::Get().Hands(from), kBytes); };
  Engine::Get().Issue(stream, std::move(copy));
}

float* Pinned() { return static_cast<float*>(Engine::Get().host_memory().Allocate(kBytes)); }

void Expect(bool right, const char* what) {
  if (!right) throw std::runtime_error(what);
}

class Programs : public ::testing::TestWithParam<int> {
 protected:
  std::vector<Ended> Run(int size, const std::function<void(int)>& program,
                         std::map<std::string, std::string> environment = {}) {
    environment["SIMGPU_SEED"] = std::to_string(GetParam());
    environment["SIMGPU_DEVICE_MB"] = "64";
    environment.emplace("SIMGPU_DEADLOCK_S", "0.4");
    return RunRanks(size, environment, program);
  }
  void FindsInOne(const std::function<void()>& program, const std::string& what) {
    const Ended ended = Run(1, [&](int) { program(); })[0];
    EXPECT_EQ(ended.status, 0) << ended.text;
    EXPECT_GT(ended.findings, 0) << ended.text;
    EXPECT_THAT(ended.text, HasSubstr(what));
  }
  void IsClean(int size, const std::function<void(int)>& program,
               const std::map<std::string, std::string>& environment = {}) {
    for (const Ended& ended : Run(size, program, environment)) {
      EXPECT_EQ(ended.status, 0) << ended.text;
      EXPECT_EQ(ended.findings, 0) << ended.text;
    }
  }
};

// ---- one process
// ---------------------------------------------------------------------------------

void UploadOnOneComputeOnAnother(bool waits) {
  Engine& engine = Engine::Get();
  float* host = Pinned();
  std::iota(host, host + kFloats, 0.0F);
  void* device = engine.Allocate(0, kBytes);
  const int side = engine.CreateStream(0), main = engine.default_stream(0);
  Copy(side, host, device);
  if (waits) engine.Wait(main, engine.Record(side));
  AddOne(main, device);
  float* back = Pinned();
  Copy(main, device, back);
  engine.SynchronizeStream(main);
  if (!waits) return;
  for (size_t i = 0; i < kFloats; ++i) Expect(back[i] == static_cast<float>(i) + 1, "the sum");
}

TEST_P(Programs, AMissingWait) {
  FindsInOne([] { UploadOnOneComputeOnAnother(false); }, "by 'add one'");
  IsClean(1, [](int) { UploadOnOneComputeOnAnother(true); });
}

void WriteWhereAnotherReads(bool waits) {
  Engine& engine = Engine::Get();
  void* shared = engine.Allocate(0, kBytes);
  void* other = engine.Allocate(0, kBytes);
  const int reader = engine.CreateStream(0), writer = engine.CreateStream(0);
  AddOne(writer, shared);
  engine.Wait(reader, engine.Record(writer));
  Copy(reader, shared, other);
  if (waits) engine.Wait(writer, engine.Record(reader));
  AddOne(writer, shared);
  engine.SynchronizeDevice(0);
}

TEST_P(Programs, AWriteBeforeTheReadIsOver) {
  FindsInOne([] { WriteWhereAnotherReads(false); }, "by 'add one'");
  IsClean(1, [](int) { WriteWhereAnotherReads(true); });
}

void UseAfterFree(bool frees_early) {
  Engine& engine = Engine::Get();
  void* data = engine.Allocate(0, kBytes);
  if (frees_early) engine.Free(data);
  AddOne(engine.default_stream(0), data);
  engine.SynchronizeDevice(0);
  if (!frees_early) engine.Free(data);
}

TEST_P(Programs, AUseAfterFree) {
  FindsInOne([] { UseAfterFree(true); }, "not allocated");
  IsClean(1, [](int) { UseAfterFree(false); });
}

void HandOutToAnotherStream(bool waits) {
  // What an allocator does that was not told of the use on `side` (record_stream).
  Engine& engine = Engine::Get();
  void* block = engine.Allocate(0, kBytes);
  const int side = engine.CreateStream(0), main = engine.default_stream(0);
  AddOne(main, block);
  engine.Wait(side, engine.Record(main));
  AddOne(side, block);
  if (waits) engine.Wait(main, engine.Record(side));
  AddOne(main, block);  // its next owner's
  engine.SynchronizeDevice(0);
}

TEST_P(Programs, ABlockThatIsHandedOutTooEarly) {
  FindsInOne([] { HandOutToAnotherStream(false); }, "race");
  IsClean(1, [](int) { HandOutToAnotherStream(true); });
}

void ReadAtHost(bool waits) {
  Engine& engine = Engine::Get();
  void* device = engine.Allocate(0, kBytes);
  float* host = Pinned();
  Copy(engine.default_stream(0), device, host);
  if (waits) engine.SynchronizeStream(engine.default_stream(0));
  volatile float first = host[0];
  static_cast<void>(first);
  engine.SynchronizeDevice(0);
}

TEST_P(Programs, AHostThatReadsTooEarly) {
  FindsInOne([] { ReadAtHost(false); }, "may still be writing");
  IsClean(1, [](int) { ReadAtHost(true); });
}

void WriteAtHost(bool waits) {
  Engine& engine = Engine::Get();
  void* device = engine.Allocate(0, kBytes);
  float* host = Pinned();
  Copy(engine.default_stream(0), host, device);
  volatile float first = host[0];  // to read it is right
  static_cast<void>(first);
  if (waits) engine.SynchronizeStream(engine.default_stream(0));
  host[kFloats - 1] = 1;
  engine.SynchronizeDevice(0);
}

TEST_P(Programs, AHostThatWritesTooEarly) {
  FindsInOne([] { WriteAtHost(false); }, "may still be reading");
  IsClean(1, [](int) { WriteAtHost(true); });
}

TEST_P(Programs, NeighboursOnAPageAreNotMeant) {
  IsClean(1, [](int) {
    Engine& engine = Engine::Get();
    void* device = engine.Allocate(0, kBytes);
    std::vector<char> memory(4 * kBytes);
    char* part = memory.data() + 100;
    Expect(engine.host_memory().Register(part, kBytes), "it can be registered");
    Copy(engine.default_stream(0), device, part);
    memory[99] = memory[100 + kBytes] = 1;
    engine.SynchronizeDevice(0);
    Expect(part[0] == static_cast<char>(0xff), "the device's bytes have come");
    Expect(engine.host_memory().Unregister(part), "it was registered");
  });
}

TEST_P(Programs, AHostThatTouchesTheDevice) {
  const Ended ended = Run(1, [](int) {
    volatile auto* device = static_cast<float*>(Engine::Get().Allocate(0, kBytes));
    device[3] = 1;
  })[0];
  EXPECT_EQ(ended.status, kHostOnDeviceExit) << ended.text;
  EXPECT_THAT(ended.text, HasSubstr("memory of device 0"));
}

// ---- several
// -------------------------------------------------------------------------------------

Call AllReduceOf(void* data) {
  Call call{Collective::kAllReduce};
  call.send = call.receive = data;
  call.count = kFloats;
  return call;
}

void Fill(int stream, void* data, float value) {
  Operation kernel;
  kernel.name = "fill";
  kernel.accesses = {Writes(data, kBytes)};
  kernel.run = [=] {
    auto* floats = static_cast<float*>(Engine::Get().Hands(data));
    std::fill(floats, floats + kFloats, value);
  };
  Engine::Get().Issue(stream, std::move(kernel));
}

float FirstOf(int stream, void* data) {
  float* host = Pinned();
  Copy(stream, data, host);
  Engine::Get().SynchronizeStream(stream);
  return host[0];
}

TEST_P(Programs, RanksThatCallDifferentCollectives) {
  const auto program = [](int rank, bool same) {
    Engine& engine = Engine::Get();
    const auto all = Communicator::Open("all", rank, 2, 0);
    void* data = engine.Allocate(0, 2 * kBytes);
    Fill(0, data, static_cast<float>(rank + 1));
    Call call = AllReduceOf(data);
    if (!same && rank == 1) call.count /= 2;
    all->Launch(0, {call});
    Expect(FirstOf(0, data) == 3, "1 + 2");
  };
  for (const Ended& ended : Run(2, [&](int rank) { program(rank, false); })) {
    EXPECT_EQ(ended.status, kMismatchExit) << ended.text;
    EXPECT_THAT(ended.text, HasSubstr("AllReduce of 512 elements"));
  }
  IsClean(2, [&](int rank) { program(rank, true); });
}

TEST_P(Programs, RanksInDifferentOrders) {
  const auto program = [](int rank, bool same) {
    Engine& engine = Engine::Get();
    const auto one = Communicator::Open("one", rank, 2, 0);
    const auto two = Communicator::Open("two", rank, 2, 0);
    void* a = engine.Allocate(0, kBytes);
    void* b = engine.Allocate(0, kBytes);
    Fill(0, a, 1);
    Fill(0, b, 2);
    const bool turned = !same && rank == 1;
    (turned ? two : one)->Launch(0, {AllReduceOf(turned ? b : a)});
    (turned ? one : two)->Launch(0, {AllReduceOf(turned ? a : b)});
    Expect(FirstOf(0, a) == 2 && FirstOf(0, b) == 4, "the sums");
  };
  for (const Ended& ended : Run(2, [&](int rank) { program(rank, false); })) {
    EXPECT_EQ(ended.status, kDeadlockExit) << ended.text;
    EXPECT_THAT(ended.text, HasSubstr("stream 0 (device 0): "));
    EXPECT_THAT(ended.text, HasSubstr("rank 0 of 2', waits for rank 1"));
    EXPECT_THAT(ended.text, HasSubstr("rank 1 of 2', waits for rank 0"));
  }
  IsClean(2, [&](int rank) { program(rank, true); });
}

/// On rank 0 the second collective stands behind a wait for the first in the device's one queue,
/// though not in its stream.
void BehindAWait(int rank) {
  Engine& engine = Engine::Get();
  const auto one = Communicator::Open("one", rank, 2, 0);
  const auto two = Communicator::Open("two", rank, 2, 0);
  void* a = engine.Allocate(0, kBytes);
  void* b = engine.Allocate(0, kBytes);
  const int s = engine.CreateStream(0), t = engine.CreateStream(0), u = engine.CreateStream(0);
  Fill(s, a, 1);
  Fill(u, b, 2);
  if (rank == 0) {
    one->Launch(s, {AllReduceOf(a)});
    engine.Wait(t, engine.Record(s));
    two->Launch(u, {AllReduceOf(b)});
  } else {
    engine.Wait(s, engine.Record(u));
    two->Launch(s, {AllReduceOf(b)});
    one->Launch(s, {AllReduceOf(a)});
  }
  engine.SynchronizeDevice(0);
}

TEST_P(Programs, StreamsThatShareAHardwareQueue) {
  for (const Ended& ended : Run(2, BehindAWait, {{"CUDA_DEVICE_MAX_CONNECTIONS", "1"}})) {
    EXPECT_EQ(ended.status, kDeadlockExit) << ended.text;
  }
  IsClean(2, BehindAWait, {{"CUDA_DEVICE_MAX_CONNECTIONS", "8"}});
}

TEST_P(Programs, APeerThatHasEnded) {
  const auto all = Run(3, [](int rank) {
    const auto all_ranks = Communicator::Open("all", rank, 3, 0);
    if (rank == 2) return;
    void* data = Engine::Get().Allocate(0, kBytes);
    all_ranks->Launch(0, {AllReduceOf(data)});
    Engine::Get().SynchronizeStream(0);
  });
  EXPECT_EQ(all[0].status, kDeadlockExit) << all[0].text;
  EXPECT_EQ(all[1].status, kDeadlockExit) << all[1].text;
}

TEST_P(Programs, AHostThatAsksForEver) {
  const auto all = Run(2, [](int rank) {
    const auto both = Communicator::Open("both", rank, 2, 0);
    Engine& engine = Engine::Get();
    void* data = engine.Allocate(0, kBytes);
    if (rank == 1) return;
    both->Launch(0, {AllReduceOf(data)});
    const auto event = engine.Record(0);
    while (!engine.Query(event)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT_EQ(all[0].status, kDeadlockExit) << all[0].text;
}

TEST_P(Programs, ARankThatIsSlowIsNoDeadlock) {
  IsClean(2,
          [](int rank) {
            Engine& engine = Engine::Get();
            const auto both = Communicator::Open("both", rank, 2, 0);
            void* data = engine.Allocate(0, kBytes);
            Fill(0, data, 1);
            if (rank == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));
            both->Launch(0, {AllReduceOf(data)});
            Expect(FirstOf(0, data) == 2, "1 + 1");
          },
          {{"SIMGPU_DEADLOCK_S", "0.1"}});
}

INSTANTIATE_TEST_SUITE_P(Seeds, Programs, Range(0, 20));

}  // namespace
}  // namespace simgpu
