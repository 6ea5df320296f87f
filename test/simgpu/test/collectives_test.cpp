// What collectives give, beside sums made by hand.
#include <c10/util/BFloat16.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "simgpu/core/engine.h"
#include "simgpu/nccl/communicator.h"
#include "simgpu/test/ranks.h"

namespace simgpu {
namespace {

constexpr int kRanks = 3;

/// Device memory that holds these values, and what it holds.
template <typename T>
void* Device(const std::vector<T>& values) {
  void* data = Engine::Get().Allocate(0, values.size() * sizeof(T));
  std::memcpy(Engine::Get().Hands(data), values.data(), values.size() * sizeof(T));
  return data;
}
template <typename T>
std::vector<T> Values(const void* data, size_t count) {
  std::vector<T> out(count);
  std::memcpy(out.data(), Engine::Get().Hands(data), count * sizeof(T));
  return out;
}

template <typename T>
void Same(const std::vector<T>& found, const std::vector<T>& expected, const char* what) {
  if (found != expected) throw std::runtime_error(what);
}

void InRanks(const std::function<void(Communicator&, int)>& program) {
  const auto ended = RunRanks(kRanks, {{"SIMGPU_DEVICE_MB", "64"}}, [&](int rank) {
    program(*Communicator::Open("all", rank, kRanks, 0), rank);
    Engine::Get().SynchronizeDevice(0);
  });
  for (const Ended& each : ended) {
    EXPECT_EQ(each.status, 0) << each.text;
    EXPECT_EQ(each.findings, 0) << each.text;
  }
}

Call Make(Collective kind, const void* send, void* receive, size_t count, DataType type) {
  Call call{kind};
  call.send = send;
  call.receive = receive;
  call.count = count;
  call.type = type;
  return call;
}

TEST(Collectives, GatherAndScatter) {
  InRanks([](Communicator& all, int rank) {
    const auto r = static_cast<int32_t>(rank);
    void* send = Device<int32_t>({r, 10 + r});
    void* gathered = Device<int32_t>(std::vector<int32_t>(6));
    all.Launch(0, {Make(Collective::kAllGather, send, gathered, 2, DataType::kInt32)});
    void* scattered = Device<int32_t>({0, 0});
    all.Launch(0, {Make(Collective::kReduceScatter, gathered, scattered, 2, DataType::kInt32)});
    void* turned = Device<int32_t>(std::vector<int32_t>(3));
    all.Launch(0, {Make(Collective::kAllToAll, gathered, turned, 1, DataType::kInt32)});
    Engine::Get().SynchronizeStream(0);
    Same<int32_t>(Values<int32_t>(gathered, 6), {0, 10, 1, 11, 2, 12}, "all-gather");
    Same<int32_t>(Values<int32_t>(scattered, 2), {3 * r, 3 * (10 + r)}, "reduce-scatter");
    const int32_t mine = Values<int32_t>(gathered, 6)[static_cast<size_t>(rank)];
    Same<int32_t>(Values<int32_t>(turned, 3), {mine, mine, mine}, "all-to-all");
  });
}

TEST(Collectives, ReductionsOfEachKind) {
  InRanks([](Communicator& all, int rank) {
    const auto reduced = [&](Reduction reduction, double factor) {
      void* data = Device<float>({static_cast<float>(rank + 1), -2.0F, 8.0F, 1.0F});
      Call call = Make(Collective::kAllReduce, data, data, 4, DataType::kFloat32);
      call.reduction = reduction;
      call.factor = factor;
      all.Launch(0, {call});
      Engine::Get().SynchronizeStream(0);
      return Values<float>(data, 4);
    };
    Same<float>(reduced(Reduction::kSum, 1), {6, -6, 24, 3}, "sum");
    Same<float>(reduced(Reduction::kProduct, 1), {6, -8, 512, 1}, "product");
    Same<float>(reduced(Reduction::kMax, 1), {3, -2, 8, 1}, "max");
    Same<float>(reduced(Reduction::kMin, 1), {1, -2, 8, 1}, "min");
    Same<float>(reduced(Reduction::kScaledSum, 0.5), {3, -3, 12, 1.5}, "scaled sum");
    const std::vector<float> mean = reduced(Reduction::kAverage, 1);
    if (std::abs(mean[0] - 2) > 1e-6) throw std::runtime_error("average");
  });
}

TEST(Collectives, SixteenBitsAreRoundedAtEveryHop) {
  InRanks([](Communicator& all, int rank) {
    // 256 + 1 is 256 in bfloat16: who starts decides. Piece 0 starts at rank 1, 1 at 2, 2 at 0.
    const float value = rank == 0 ? 256.0F : 1.0F;
    void* data = Device(std::vector<c10::BFloat16>(3, c10::BFloat16(value)));
    all.Launch(0, {Make(Collective::kAllReduce, data, data, 3, DataType::kBfloat16)});
    Engine::Get().SynchronizeStream(0);
    const auto found = Values<c10::BFloat16>(data, 3);
    Same<float>({found[0], found[1], found[2]}, {258, 256, 256}, "bfloat16");
  });
}

TEST(Collectives, RootsAndPairs) {
  InRanks([](Communicator& all, int rank) {
    void* data = Device<int64_t>({rank});
    Call broadcast = Make(Collective::kBroadcast, data, data, 1, DataType::kInt64);
    broadcast.peer = 2;
    all.Launch(0, {broadcast});
    void* mine = Device<int64_t>({7 + rank});
    void* sum = Device<int64_t>({-1});
    Call reduce = Make(Collective::kReduce, mine, sum, 1, DataType::kInt64);
    reduce.peer = 1;
    all.Launch(0, {reduce});
    void* from_left = Device<int64_t>({-1});
    Call send = Make(Collective::kSend, mine, nullptr, 1, DataType::kInt64);
    send.peer = (rank + 1) % kRanks;
    Call receive = Make(Collective::kReceive, nullptr, from_left, 1, DataType::kInt64);
    receive.peer = (rank + kRanks - 1) % kRanks;
    all.Launch(0, {send, receive});
    Engine::Get().SynchronizeStream(0);
    Same<int64_t>(Values<int64_t>(data, 1), {2}, "broadcast");
    Same<int64_t>(Values<int64_t>(sum, 1), {rank == 1 ? 24 : -1}, "reduce");
    Same<int64_t>(Values<int64_t>(from_left, 1), {7 + receive.peer}, "pairs");
  });
}

TEST(Collectives, PartsOfTheRanks) {
  InRanks([](Communicator& all, int rank) {
    const auto part = all.Split(rank == 1 ? -1 : 0, -rank);  // 2, then 0
    if ((part == nullptr) != (rank == 1)) throw std::runtime_error("who is in it");
    if (rank == 1) return;
    if (part->size() != 2 || part->rank() != (rank == 2 ? 0 : 1)) {
      throw std::runtime_error("ranks in the order of their keys");
    }
    void* data = Device<float>({static_cast<float>(rank)});
    part->Launch(0, {Make(Collective::kAllReduce, data, data, 1, DataType::kFloat32)});
    Engine::Get().SynchronizeStream(0);
    Same<float>(Values<float>(data, 1), {2}, "sum of the part");
  });
}

TEST(Collectives, WhoAbortsLetsGoAndIsSeen) {
  InRanks([](Communicator& all, int rank) {
    void* data = Device<float>({1});
    if (rank != 2) {
      all.Launch(0, {Make(Collective::kAllReduce, data, data, 1, DataType::kFloat32)});
    }
    if (rank == 2) return all.Abort();
    while (all.lost_rank() < 0) {
    }
    all.Abort();
    Engine::Get().SynchronizeStream(0);
  });
}

}  // namespace
}  // namespace simgpu
