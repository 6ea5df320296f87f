#include "checkpoint/load/read_plan.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

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
  const auto place = [](const PlannedRead& r) {
    return std::tuple(r.file, r.read.offset, r.read.length, r.read.first);
  };
  std::stable_sort(reads_.begin(), reads_.end(),
                   [&](const auto& a, const auto& b) { return place(a) < place(b); });
  SegmentList list;
  for (size_t i = 0; i < reads_.size();) {
    const uint32_t file = reads_[i].file;
    const size_t first = list.segments.size();
    for (size_t start = i; i < reads_.size() && reads_[i].file == file; ++i) {
      const bool same = i > start && reads_[i].read.offset == reads_[i - 1].read.offset &&
                        reads_[i].read.length == reads_[i - 1].read.length;
      files_[file]->Cut(reads_[i].read, static_cast<uint32_t>(i), same, list);
    }
    const auto begin = list.segments.begin() + static_cast<std::ptrdiff_t>(first);
    std::stable_sort(begin, list.segments.end(),
                     [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
    uint32_t parts = 0;
    bool fresh = true;  // a new file, a new piece
    for (size_t s = first; s < list.segments.size(); ++s) {
      const Segment& segment = list.segments[s];
      parts += segment.kind == Segment::Kind::kPart;
      if (fresh || segment.begin - pieces_.back().end > kGap || parts >= kMaxParts ||
          std::max(segment.end, pieces_.back().end) - pieces_.back().begin > kPieceBytes) {
        pieces_.push_back(
            {file, segment.begin, segment.end, static_cast<uint32_t>(s), static_cast<uint32_t>(s)});
        parts = segment.kind == Segment::Kind::kPart;
        fresh = false;
      }
      pieces_.back().end = std::max(pieces_.back().end, segment.end);
      pieces_.back().last = static_cast<uint32_t>(s + 1);
    }
  }
  segments_ = std::move(list.segments);
  groups_ = std::move(list.groups);
  if (!groups_.empty()) part_crcs_.resize(segments_.size());
}

int64_t ReadPlan::bytes() const {
  int64_t sum = 0;
  for (const Piece& piece : pieces_) sum += piece.end - piece.begin;
  return sum;
}

std::string ReadPlan::Digest() const {
  // The plan itself as text rather than a hash of it: the caller has a better one than the CRC that
  // is at hand here.
  std::string out;
  for (const Piece& piece : pieces_) {
    // Not the whole path: another host may have the directory elsewhere.
    const std::string& path = files_[piece.file]->file().path();
    if (&piece == pieces_.data() || piece.file != (&piece - 1)->file)
      out += path.substr(path.rfind('/') + 1);
    out += " " + std::to_string(piece.begin) + "-" + std::to_string(piece.end);
    for (uint32_t s = piece.first; s < piece.last; ++s) {
      const Segment& segment = segments_[s];
      out += "," + std::to_string(segment.begin - piece.begin) + ":" +
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

bool ReadPlan::GoesDirect(const Piece& piece) const {
  const ShardFileReader& file = *files_[piece.file];
  return file.direct() != nullptr && !file.file().IsCached(piece.begin, piece.end - piece.begin);
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
  const Piece& piece = pieces_[i];
  const ShardFileReader& file = *files_[piece.file];
  const int64_t begin = PageBefore(piece.begin);
  const bool direct = GoesDirect(piece);
  // Through the page cache no more is read than is needed, to the place it has in a direct read.
  const int64_t from = direct ? begin : piece.begin,
                to = direct ? std::min(PageAfter(piece.end), file.size()) : piece.end;
  ReadRange(file, direct, from, std::max(to, piece.end), buffer + (from - begin),
            segments_[piece.first]);
  Process(piece, piece.first, piece.last, buffer, begin);
  auto* crcs = reinterpret_cast<uint32_t*>(buffer + kPieceBytes + 2 * kPage);
  for (uint32_t s = piece.first; s < piece.last; ++s) {
    if (segments_[s].kind == Segment::Kind::kPart) *crcs++ = part_crcs_[s];
  }
}

void ReadPlan::Deliver(size_t i, const std::byte* buffer) {
  const Piece& piece = pieces_[i];
  const int64_t begin = PageBefore(piece.begin);
  const auto* crcs = reinterpret_cast<const uint32_t*>(buffer + kPieceBytes + 2 * kPage);
  for (uint32_t s = piece.first; s < piece.last; ++s) {
    const Segment& segment = segments_[s];
    if (segment.kind == Segment::Kind::kPart) part_crcs_[s] = *crcs++;
    if (segment.target == nullptr) continue;
    std::memcpy(segment.target, buffer + (segment.begin - begin) + segment.from,
                segment.to - segment.from);
  }
}

void ReadPlan::Read(size_t i) {
  const Piece& piece = pieces_[i];
  const ShardFileReader& file = *files_[piece.file];
  Scratch scratch(*this);
  for (uint32_t s = piece.first; s < piece.last;) {
    const Segment& head = segments_[s];
    // What lands whole and one behind the other in memory as in the file needs no buffer; the rest,
    // up to the next of those, is read together.
    uint32_t next = s + 1;
    if (IsSummed(head) && LandsWhole(head)) {
      while (next < piece.last && segments_[next - 1].end - head.begin < kStep &&
             IsSummed(segments_[next]) && LandsWhole(segments_[next]) &&
             segments_[next].begin == segments_[next - 1].end &&
             segments_[next].target == segments_[next - 1].target +
                                           (segments_[next - 1].end - segments_[next - 1].begin)) {
        ++next;
      }
      ReadRange(file, false, head.begin, segments_[next - 1].end, head.target, head);
      for (; s < next; ++s) {
        const Segment& segment = segments_[s];
        Check(piece, s, {segment.target, static_cast<size_t>(segment.end - segment.begin)}, {});
      }
      continue;
    }
    int64_t end = head.end;
    while (next < piece.last && !(IsSummed(segments_[next]) && LandsWhole(segments_[next]))) {
      end = std::max(end, segments_[next].end);
      ++next;
    }
    ReadRange(file, false, head.begin, end, scratch.data(), head);
    Process(piece, s, next, scratch.data(), head.begin);
    s = next;
  }
}

// Checks segments [first, last) in `bytes`, which begin at `begin` of the file, and delivers what
// is wanted of them.
void ReadPlan::Process(const Piece& piece, uint32_t first, uint32_t last, const std::byte* bytes,
                       int64_t begin) {
  for (uint32_t s = first; s < last; ++s) {
    const Segment& segment = segments_[s];
    const std::span range(bytes + (segment.begin - begin),
                          static_cast<size_t>(segment.end - segment.begin));
    const bool whole = IsSummed(segment) && LandsWhole(segment);
    Check(piece, s, range,
          whole ? std::span(segment.target, range.size()) : std::span<std::byte>());
    if (!whole && segment.target != nullptr)
      std::memcpy(segment.target, range.data() + segment.from, segment.to - segment.from);
  }
}

// `copy`: where the bytes go while they are summed, or nothing.
void ReadPlan::Check(const Piece& piece, uint32_t number, std::span<const std::byte> bytes,
                     std::span<std::byte> copy) {
  const Segment& segment = segments_[number];
  if (segment.kind == Segment::Kind::kRecord) return CheckRecord(piece, segment, bytes);
  if (segment.kind == Segment::Kind::kZeros) {
    // Each byte equals the one before, and the first is zero.
    if (bytes[0] != std::byte{0} ||
        std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) != 0)
      Fail(piece.file, segment, "padding of zeros", "other bytes");
    return;
  }
  const uint32_t crc = copy.empty() ? base::Crc32(bytes) : base::CopyAndCrc32(copy, bytes);
  if (segment.kind == Segment::Kind::kPart) {
    part_crcs_[number] = crc;
  } else if (crc != segment.crc) {
    Fail(piece.file, segment, base::CrcText(segment.crc), base::CrcText(crc));
  }
}

void ReadPlan::CheckRecord(const Piece& piece, const Segment& segment,
                           std::span<const std::byte> bytes) const {
  const format::IndexEntry& entry = *segment.entry;
  const auto head = static_cast<size_t>(entry.head), tail = static_cast<size_t>(entry.tail);
  const uint32_t framing = base::Crc32(bytes.last(tail), base::Crc32(bytes.first(head)));
  if (framing != entry.framing_crc)
    Fail(piece.file, segment, base::CrcText(entry.framing_crc) + " of the framing",
         base::CrcText(framing));
  const uint32_t payload = base::Crc32(bytes.subspan(head, static_cast<size_t>(entry.payload)));
  if (payload != entry.payload_crc)
    Fail(piece.file, segment, base::CrcText(entry.payload_crc), base::CrcText(payload));
}

void ReadPlan::Finish() const {
  std::vector<uint32_t> crcs(groups_.size());
  for (const Piece& piece : pieces_) {
    for (uint32_t s = piece.first; s < piece.last && !groups_.empty(); ++s) {
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
  base::ParallelFor(pieces_.size(), threads, [&](size_t i) { Read(i); });
  Finish();
}

}  // namespace hsdp_ckpt::checkpoint
