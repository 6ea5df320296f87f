#include "checkpoint/load/read_plan.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <string_view>

#include "base/crc32.h"
#include "base/error.h"
#include "base/parallel.h"

namespace hsdp_ckpt::checkpoint {
namespace {

// Unwanted bytes between two wanted ranges that are read rather than skipped.
constexpr int64_t kGap = 16 << 10;
// Bytes that one call puts into a target: they are still in the cache when they are summed.
constexpr int64_t kStep = 256 << 10;

int64_t PageBefore(int64_t offset) { return offset / ReadPlan::kPage * ReadPlan::kPage; }
int64_t PageAfter(int64_t offset) { return PageBefore(offset + ReadPlan::kPage - 1); }

bool LandsWhole(const Segment& s) {
  return s.target != nullptr && s.from == 0 && s.to == s.end - s.begin;
}
bool IsSummed(const Segment& s) {
  return s.kind == Segment::Kind::kBlock || s.kind == Segment::Kind::kPart;
}
// Whether `b` follows `a` in the file and in memory, so that one call can read both.
bool LandsBehind(const Segment& a, const Segment& b) {
  return b.begin == a.end && b.target == a.target + (a.end - a.begin);
}

// For each file, how many have a name before its own. Files are numbered as this process has opened
// them; the ranks of an exchange have to have their extents in one order, so in that of the names.
std::vector<uint32_t> PlacesByName(const std::vector<const ShardFileReader*>& files) {
  std::vector<uint32_t> numbers(files.size()), places(files.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  const auto name = [&](uint32_t number) {
    return files[number] == nullptr ? std::string_view{} : files[number]->file().path();
  };
  std::stable_sort(numbers.begin(), numbers.end(),
                   [&](uint32_t a, uint32_t b) { return name(a) < name(b); });
  for (uint32_t i = 0; i < numbers.size(); ++i) places[numbers[i]] = i;
  return places;
}

void SortByPlace(std::vector<PlannedRead>& reads,
                 const std::vector<const ShardFileReader*>& files) {
  const std::vector<uint32_t> of_file = PlacesByName(files);
  const auto place = [&](const PlannedRead& r) {
    return std::tuple(of_file[r.file], r.read.offset, r.read.length, r.read.first);
  };
  std::stable_sort(reads.begin(), reads.end(),
                   [&](const auto& a, const auto& b) { return place(a) < place(b); });
}

bool IsSameRecord(const PayloadRead& a, const PayloadRead& b) {
  return a.offset == b.offset && a.length == b.length;
}

// Whether an extent may grow by the next segment of its file.
bool Extends(const Extent& extent, const Segment& segment) {
  const int64_t end = std::max(segment.end, extent.end);
  return segment.begin - extent.end <= kGap && end - extent.begin <= ReadPlan::kExtentBytes;
}

}  // namespace

/// A buffer of the plan's, for the time of one Read.
class ReadPlan::Scratch {
 public:
  explicit Scratch(ReadPlan& plan) : plan_(plan) {
    const std::lock_guard lock(plan_.mutex_);
    if (!plan_.idle_.empty()) {
      buffer_ = std::move(plan_.idle_.back());
      plan_.idle_.pop_back();
    }
  }
  ~Scratch() {
    if (!buffer_) return;
    const std::lock_guard lock(plan_.mutex_);
    plan_.idle_.push_back(std::move(buffer_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::byte* data() {
    if (!buffer_) buffer_ = base::AlignedBuffer(kBufferBytes);
    return buffer_.data();
  }

 private:
  ReadPlan& plan_;
  base::AlignedBuffer buffer_;
};

ReadPlan::ReadPlan(std::span<const std::unique_ptr<ShardFileReader>> files,
                   std::vector<PlannedRead> reads)
    : reads_(std::move(reads)) {
  for (const auto& file : files) files_.push_back(file.get());
  SortByPlace(reads_, files_);
  SegmentList list;
  for (size_t read = 0; read < reads_.size();) {
    const uint32_t file = reads_[read].file;
    const size_t first = list.segments.size();
    read = CutReadsOfFile(read, list);
    JoinIntoExtents(file, list.segments, first);
  }
  segments_ = std::move(list.segments);
  groups_ = std::move(list.groups);
  if (!groups_.empty()) part_crcs_.resize(segments_.size());
}

// Appends the segments of all reads of the file that read `first` goes to, in the file's order.
// Returns the number of the next file's first read.
size_t ReadPlan::CutReadsOfFile(size_t first, SegmentList& out) const {
  const uint32_t file = reads_[first].file;
  const auto old_size = static_cast<std::ptrdiff_t>(out.segments.size());
  size_t i = first;
  for (; i < reads_.size() && reads_[i].file == file; ++i) {
    const bool same_record = i > first && IsSameRecord(reads_[i].read, reads_[i - 1].read);
    files_[file]->Cut(reads_[i].read, static_cast<uint32_t>(i), same_record, out);
  }
  std::stable_sort(out.segments.begin() + old_size, out.segments.end(),
                   [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
  return i;
}

// Appends extents for segments[first:], which are all of one file and in its order.
void ReadPlan::JoinIntoExtents(uint32_t file, std::span<const Segment> segments, size_t first) {
  uint32_t parts = 0;  // in the current extent, counting the segment that is looked at
  for (size_t s = first; s < segments.size(); ++s) {
    const Segment& segment = segments[s];
    const bool is_part = segment.kind == Segment::Kind::kPart;
    const auto number = static_cast<uint32_t>(s);
    parts += is_part;
    if (s == first || !Extends(extents_.back(), segment) || parts >= kMaxParts) {
      extents_.push_back({file, segment.begin, segment.end, number, number});
      parts = is_part;
    }
    extents_.back().end = std::max(extents_.back().end, segment.end);
    extents_.back().last = number + 1;
  }
}

int64_t ReadPlan::bytes() const {
  int64_t sum = 0;
  for (const Extent& extent : extents_) sum += extent.end - extent.begin;
  return sum;
}

std::string ReadPlan::Digest() const {
  // The plan itself as text rather than a hash of it: the caller has a better one than the CRC that
  // is at hand here.
  std::string out;
  for (const Extent& extent : extents_) {
    // Not the whole path: another host may have the directory elsewhere.
    const std::string& path = files_[extent.file]->file().path();
    if (&extent == extents_.data() || extent.file != (&extent - 1)->file)
      out += path.substr(path.rfind('/') + 1);
    out += " " + std::to_string(extent.begin) + "-" + std::to_string(extent.end);
    for (uint32_t s = extent.first; s < extent.last; ++s) {
      const Segment& segment = segments_[s];
      out += "," + std::to_string(segment.begin - extent.begin) + ":" +
             std::to_string(segment.end - segment.begin);
    }
  }
  return out;
}

void ReadPlan::Fail(uint32_t file, const Segment& segment, const std::string& expected,
                    const std::string& got) const {
  const PayloadRead& read = reads_[segment.read].read;
  const std::string place = " (bytes " + std::to_string(segment.begin) + " to " +
                            std::to_string(segment.end) + " of the file)";
  throw base::CorruptionError(files_[file]->file().path(), read.name + place, expected, got);
}

bool ReadPlan::GoesDirect(const Extent& extent) const {
  const ShardFileReader& file = *files_[extent.file];
  return file.direct() != nullptr && !file.file().IsCached(extent.begin, extent.end - extent.begin);
}

// Reads [begin, end) of a file to `at`; for a direct read all three are page-aligned, but for an
// end at the file's own.
void ReadPlan::ReadRange(const ShardFileReader& file, bool direct, int64_t begin, int64_t end,
                         std::byte* at, const Segment& for_whom) {
  bytes_read_ += end - begin;
  const std::string& name = reads_[for_whom.read].read.name;
  if (direct) {
    try {
      return file.direct()->ReadDirect({at, static_cast<size_t>(PageAfter(end) - begin)}, begin,
                                       end, name);
    } catch (const base::IoError& error) {
      // Opened for direct reads, and refuses them: some network and stacked file systems.
      if (error.error_number() != EINVAL) throw;
    }
  }
  file.file().ReadAt({at, static_cast<size_t>(end - begin)}, begin, name);
}

void ReadPlan::Fill(size_t i, std::byte* buffer) {
  const Extent& extent = extents_[i];
  const ShardFileReader& file = *files_[extent.file];
  const int64_t begin = PageBefore(extent.begin);
  const bool direct = GoesDirect(extent);
  // Through the page cache no more is read than is needed, to the place it has in a direct read.
  const int64_t from = direct ? begin : extent.begin;
  const int64_t to = direct ? std::min(PageAfter(extent.end), file.size()) : extent.end;
  ReadRange(file, direct, from, std::max(to, extent.end), buffer + (from - begin),
            segments_[extent.first]);
  Process(extent, extent.first, extent.last, buffer, begin);
  auto* crcs = reinterpret_cast<uint32_t*>(buffer + kExtentBytes + 2 * kPage);
  for (uint32_t s = extent.first; s < extent.last; ++s) {
    if (segments_[s].kind == Segment::Kind::kPart) *crcs++ = part_crcs_[s];
  }
}

void ReadPlan::Deliver(size_t i, const std::byte* buffer) {
  const Extent& extent = extents_[i];
  const int64_t begin = PageBefore(extent.begin);
  const auto* crcs = reinterpret_cast<const uint32_t*>(buffer + kExtentBytes + 2 * kPage);
  for (uint32_t s = extent.first; s < extent.last; ++s) {
    const Segment& segment = segments_[s];
    if (segment.kind == Segment::Kind::kPart) part_crcs_[s] = *crcs++;
    if (segment.target == nullptr) continue;
    std::memcpy(segment.target, buffer + (segment.begin - begin) + segment.from,
                segment.to - segment.from);
  }
}

void ReadPlan::Read(size_t i) {
  const Extent& extent = extents_[i];
  Scratch scratch(*this);
  for (uint32_t s = extent.first; s < extent.last;) {
    const bool lands = IsSummed(segments_[s]) && LandsWhole(segments_[s]);
    s = lands ? ReadInPlace(extent, s) : ReadThroughScratch(extent, s, scratch);
  }
}

// Reads what lands whole and one behind the other in memory as in the file, from segment `first`
// on, straight into its targets, and checks it there. Returns the segment after the last one.
uint32_t ReadPlan::ReadInPlace(const Extent& extent, uint32_t first) {
  const Segment& head = segments_[first];
  uint32_t next = first + 1;
  while (next < extent.last && segments_[next - 1].end - head.begin < kStep &&
         IsSummed(segments_[next]) && LandsWhole(segments_[next]) &&
         LandsBehind(segments_[next - 1], segments_[next])) {
    ++next;
  }
  const ShardFileReader& file = *files_[extent.file];
  ReadRange(file, false, head.begin, segments_[next - 1].end, head.target, head);
  for (uint32_t s = first; s < next; ++s) {
    const Segment& segment = segments_[s];
    Check(extent, s, {segment.target, static_cast<size_t>(segment.end - segment.begin)}, {});
  }
  return next;
}

// Reads segment `first` and those behind it, up to the next that lands whole, together into a
// buffer. Returns the segment after the last one.
uint32_t ReadPlan::ReadThroughScratch(const Extent& extent, uint32_t first, Scratch& scratch) {
  const Segment& head = segments_[first];
  int64_t end = head.end;
  uint32_t next = first + 1;
  while (next < extent.last && !(IsSummed(segments_[next]) && LandsWhole(segments_[next]))) {
    end = std::max(end, segments_[next].end);
    ++next;
  }
  ReadRange(*files_[extent.file], false, head.begin, end, scratch.data(), head);
  Process(extent, first, next, scratch.data(), head.begin);
  return next;
}

// Checks segments [first, last) in `bytes`, which begin at `begin` of the file, and delivers what
// is wanted of them.
void ReadPlan::Process(const Extent& extent, uint32_t first, uint32_t last, const std::byte* bytes,
                       int64_t begin) {
  for (uint32_t s = first; s < last; ++s) {
    const Segment& segment = segments_[s];
    const std::span range(bytes + (segment.begin - begin),
                          static_cast<size_t>(segment.end - segment.begin));
    const bool whole = IsSummed(segment) && LandsWhole(segment);
    Check(extent, s, range,
          whole ? std::span(segment.target, range.size()) : std::span<std::byte>());
    if (!whole && segment.target != nullptr)
      std::memcpy(segment.target, range.data() + segment.from, segment.to - segment.from);
  }
}

// `copy`: where the bytes go while they are summed, or nothing.
void ReadPlan::Check(const Extent& extent, uint32_t number, std::span<const std::byte> bytes,
                     std::span<std::byte> copy) {
  const Segment& segment = segments_[number];
  if (segment.kind == Segment::Kind::kRecord) return CheckRecord(extent, segment, bytes);
  if (segment.kind == Segment::Kind::kZeros) {
    // Each byte equals the one before, and the first is zero.
    if (bytes[0] != std::byte{0} ||
        std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) != 0)
      Fail(extent.file, segment, "padding of zeros", "other bytes");
    return;
  }
  const uint32_t crc = copy.empty() ? base::Crc32(bytes) : base::CopyAndCrc32(copy, bytes);
  if (segment.kind == Segment::Kind::kPart) {
    part_crcs_[number] = crc;
  } else if (crc != segment.crc) {
    Fail(extent.file, segment, base::CrcText(segment.crc), base::CrcText(crc));
  }
}

void ReadPlan::CheckRecord(const Extent& extent, const Segment& segment,
                           std::span<const std::byte> bytes) const {
  const format::IndexEntry& entry = *segment.entry;
  const auto head = static_cast<size_t>(entry.head), tail = static_cast<size_t>(entry.tail);
  const uint32_t framing = base::Crc32(bytes.last(tail), base::Crc32(bytes.first(head)));
  if (framing != entry.framing_crc)
    Fail(extent.file, segment, base::CrcText(entry.framing_crc) + " of the framing",
         base::CrcText(framing));
  const uint32_t payload = base::Crc32(bytes.subspan(head, static_cast<size_t>(entry.payload)));
  if (payload != entry.payload_crc)
    Fail(extent.file, segment, base::CrcText(entry.payload_crc), base::CrcText(payload));
}

void ReadPlan::Finish() const {
  std::vector<uint32_t> crcs(groups_.size());
  for (const Extent& extent : extents_) {
    for (uint32_t s = extent.first; s < extent.last && !groups_.empty(); ++s) {
      const Segment& segment = segments_[s];
      if (segment.kind != Segment::Kind::kPart) continue;
      uint32_t& crc = crcs[segment.crc];
      crc = base::Crc32Combine(crc, part_crcs_[s],
                               static_cast<uint64_t>(segment.end - segment.begin));
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (crcs[g] == groups_[g].crc) continue;
    const PlannedRead& planned = reads_[groups_[g].read];
    throw base::CorruptionError(files_[planned.file]->file().path(), planned.read.name,
                                base::CrcText(groups_[g].crc), base::CrcText(crcs[g]));
  }
}

void ReadPlan::ReadAll(int threads) {
  base::ParallelFor(extents_.size(), threads, [&](size_t i) { Read(i); });
  Finish();
}

}  // namespace hsdp_ckpt::checkpoint
