// What writes a checkpoint: data files, the claim on a directory, the commit. Memory crosses as
// addresses: the caller keeps it alive and contiguous during the call. The GIL is released for all
// that reads, writes or waits.

#include "base/crc32.h"
#include "base/error.h"
#include "checkpoint/commit/claim.h"
#include "checkpoint/commit/commit.h"
#include "checkpoint/commit/process_identity.h"
#include "checkpoint/save/shard_file_writer.h"
#include "format/data_file_name.h"
#include "format/record.h"
#include "format/tensor_pickle.h"
#include "io/file.h"
#include "python/module.h"
#include "python/text_for_people.h"
#include "snapshot/staging_copy.h"

namespace py = pybind11;

namespace hsdp_ckpt::python {
namespace {

using Shape = std::vector<int64_t>;
using PlaceResult = std::pair<int64_t, int64_t>;

// Memory that is laid out as a data file is from `offset` on.
struct ImageMemory {
  int64_t offset = 0;
  uintptr_t address = 0;
  int64_t size = 0;
};

const format::RecordDtype& KnownDtype(const std::string& name) {
  const format::RecordDtype* dtype = format::FindRecordDtype(name);
  if (dtype == nullptr) throw py::value_error("no record format for dtype " + name);
  return *dtype;
}

std::span<const std::byte> Bytes(const py::buffer_info& view) {
  return {static_cast<const std::byte*>(view.ptr), static_cast<size_t>(view.size * view.itemsize)};
}

std::vector<PlaceResult> WriteAll(checkpoint::ShardFileWriter& writer,
                                  const std::vector<checkpoint::RecordSource>& records) {
  std::vector<PlaceResult> places;
  const py::gil_scoped_release release;
  for (const auto& place : writer.Write(records)) places.emplace_back(place.offset, place.length);
  return places;
}

// A payload, or the part of one that begins at its byte `first`: `size` bytes at `address`.
checkpoint::RecordSource MakeRecordPart(std::string name, const std::string& dtype, Shape shape,
                                        uintptr_t address, int64_t first, size_t size) {
  return {std::move(name),
          &KnownDtype(dtype),
          std::move(shape),
          {reinterpret_cast<const std::byte*>(address), size},
          first};
}

std::vector<PlaceResult> WriteObjects(
    checkpoint::ShardFileWriter& writer,
    const std::vector<std::pair<std::string, py::buffer>>& objects) {
  std::vector<checkpoint::RecordSource> records;
  std::vector<py::buffer_info> views;  // keep the memory where it is until the write is over
  views.reserve(objects.size());
  for (const auto& [name, buffer] : objects) {
    const py::buffer_info& view = views.emplace_back(buffer.request());
    records.push_back({.name = name, .shape = {}, .data = Bytes(view)});
  }
  return WriteAll(writer, records);
}

std::string MakeFileName(int64_t rank, uint64_t save_id, int64_t number) {
  return format::DataFileName{rank, save_id, checkpoint::ThisProcess(), false, number}.ToString();
}

// The process in the name of a data file or of a claim.
std::optional<format::ProcessIdentity> OwnerOf(const std::string& name) {
  if (const auto data = format::DataFileName::Parse(name)) return data->owner;
  const auto claim = checkpoint::ParseClaim(name);
  return claim ? std::optional(claim->writer.owner) : std::nullopt;
}

std::optional<bool> IsRunning(const format::ProcessIdentity& process, int64_t modified) {
  const checkpoint::Liveness liveness = checkpoint::LookAtProcesses()(process, modified);
  if (liveness == checkpoint::Liveness::kUnknown) return std::nullopt;
  return liveness == checkpoint::Liveness::kRunning;
}

std::string MakeTorchPrefix(int64_t rank, uint64_t save_id) {
  const std::string name =
      format::DataFileName{rank, save_id, checkpoint::ThisProcess(), true, 0}.ToString();
  return name.substr(0, name.rfind('_') + 1);
}

std::unique_ptr<checkpoint::ShardFileWriter> MakeWriter(
    const std::string& directory, const std::string& name, int threads, bool sync, int64_t reserve,
    const ImageMemory& image, std::vector<std::shared_ptr<snapshot::StagingCopy>> copies,
    std::vector<uint32_t> owners) {
  const auto parsed = format::DataFileName::Parse(name);
  if (!parsed) throw py::value_error("not a data file's name: " + name);
  const py::gil_scoped_release release;
  const auto checksums = [copies = std::move(copies)](const std::byte* payload) {
    std::span<const uint32_t> found;
    for (size_t i = 0; i < copies.size() && found.empty(); ++i)
      found = copies[i]->Checksums(payload);
    return found;
  };
  return std::make_unique<checkpoint::ShardFileWriter>(
      io::PosixFileSystem(), directory, *parsed,
      checkpoint::WriterOptions{
          .threads = threads,
          .sync = sync,
          .reserve = reserve,
          .owners = std::move(owners),
          .image = {image.offset,
                    {reinterpret_cast<std::byte*>(image.address), static_cast<size_t>(image.size)},
                    checksums}});
}

// A request that holds the buffer of its metadata.
struct CommitRequest {
  py::buffer_info metadata;
  checkpoint::CommitRequest request;
};

std::unique_ptr<CommitRequest> MakeCommitRequest(std::string directory, std::string metadata_name,
                                                 std::string claim, const py::buffer& metadata,
                                                 std::vector<checkpoint::ExpectedFile> files,
                                                 std::vector<std::string> superseded, bool sync) {
  auto owned = std::make_unique<CommitRequest>();
  owned->metadata = metadata.request();
  owned->request = {.directory = std::move(directory),
                    .metadata_name = std::move(metadata_name),
                    .claim = std::move(claim),
                    .metadata = Bytes(owned->metadata),
                    .files = std::move(files),
                    .superseded = std::move(superseded),
                    .sync = sync};
  return owned;
}

checkpoint::CleanupResult CommitCheckpoint(const CommitRequest& owned) {
  return checkpoint::Commit(io::PosixFileSystem(), owned.request, checkpoint::LookAtProcesses());
}

py::list TextsForPeople(const std::vector<std::string>& texts) {
  py::list shown;
  for (const std::string& text : texts) shown.append(TextForPeople(text));
  return shown;
}

int64_t RecordBytes(const std::string& dtype, const Shape& shape) {
  return format::SizeOfRecord(KnownDtype(dtype), shape).total();
}

std::vector<std::string> RecordDtypeNames() {
  std::vector<std::string> names;
  for (const format::RecordDtype& dtype : format::RecordDtypes()) names.emplace_back(dtype.name);
  return names;
}

}  // namespace

void BindCheckpoint(py::module_& module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<ImageMemory>(module, "FileImage")
      .def(py::init([](int64_t offset, uintptr_t address, int64_t size) {
             return ImageMemory{offset, address, size};
           }),
           py::arg("offset") = 0, py::arg("address") = 0, py::arg("size") = 0)
      .def_readonly("offset", &ImageMemory::offset)
      .def_readonly("address", &ImageMemory::address)
      .def_readonly("size", &ImageMemory::size);
  py::class_<checkpoint::RecordSource>(module, "RecordPart")
      .def(py::init(&MakeRecordPart), py::arg("name"), py::arg("dtype"), py::arg("shape"),
           py::arg("address"), py::arg("first"), py::arg("size"))
      .def_property_readonly("size",
                             [](const checkpoint::RecordSource& part) { return part.data.size(); });
  py::class_<checkpoint::WrittenFile>(module, "WrittenFile")
      .def_readonly("size", &checkpoint::WrittenFile::size)
      .def_readonly("direct", &checkpoint::WrittenFile::direct);
  py::class_<checkpoint::ExpectedFile>(module, "ExpectedFile")
      .def(py::init([](std::string name, int64_t size, bool exact) {
             return checkpoint::ExpectedFile{std::move(name), size, exact};
           }),
           py::arg("name"), py::arg("size"), py::arg("exact"))
      .def_readonly("size", &checkpoint::ExpectedFile::size);
  py::class_<CommitRequest>(module, "CommitRequest")
      .def(py::init(&MakeCommitRequest), py::kw_only(), py::arg("directory"),
           py::arg("metadata_name"), py::arg("claim"), py::arg("metadata"), py::arg("files"),
           py::arg("superseded"), py::arg("sync"));
  py::class_<checkpoint::CleanupResult>(module, "CleanupResult")
      .def_property_readonly(
          "removed",
          [](const checkpoint::CleanupResult& result) { return TextsForPeople(result.removed); })
      .def_property_readonly("left", [](const checkpoint::CleanupResult& result) {
        return TextsForPeople(result.left);
      });
  py::class_<checkpoint::ShardFileWriter>(module, "ShardFileWriter")
      .def(py::init(&MakeWriter), py::arg("directory"), py::arg("name"), py::arg("threads"),
           py::arg("sync"), py::arg("reserve"), py::arg("image"), py::arg("copies"),
           py::arg("owners"))
      .def("write_tensors", &WriteAll, py::arg("parts"))
      .def("write_objects", &WriteObjects, py::arg("objects"))
      .def("finish", &checkpoint::ShardFileWriter::Finish, released);
  module.def("commit_checkpoint", &CommitCheckpoint, py::arg("request"), released);
  module.def(
      "claim_directory",
      [](const std::string& directory, const std::string& metadata_name, uint64_t save_id,
         bool overwrite) {
        return checkpoint::ClaimDirectory(io::PosixFileSystem(), directory, metadata_name, save_id,
                                          overwrite);
      },
      py::arg("directory"), py::arg("metadata_name"), py::arg("save_id"), py::arg("overwrite"),
      released);
  module.def(
      "release_claim",
      [](const std::string& directory, const std::string& claim) {
        checkpoint::ReleaseClaim(io::PosixFileSystem(), directory, claim);
      },
      py::arg("directory"), py::arg("claim"), released);
  module.def(
      "remove_leftovers",
      [](const std::string& directory, const std::string& metadata_name, const std::string& claim,
         const std::vector<format::ProcessIdentity>& own, bool sync) {
        return checkpoint::RemoveLeftovers(io::PosixFileSystem(), directory, metadata_name, claim,
                                           own, sync, checkpoint::LookAtProcesses());
      },
      py::arg("directory"), py::arg("metadata_name"), py::arg("claim"), py::arg("own"),
      py::arg("sync"), released);
  module.def(
      "make_directories",
      [](const std::string& path, bool sync) {
        io::MakeDirectories(io::PosixFileSystem(), path, sync);
      },
      py::arg("path"), py::arg("sync"), released);
  module.def(
      "sync_directory",
      [](const std::string& path) { io::SyncDirectory(io::PosixFileSystem(), path); },
      py::arg("path"), released);
  module.def("new_save_id", &format::NewSaveId, py::arg("claimed"));
  module.def(
      "record_owner",
      [](const std::string& name, const Shape& chunk) { return format::RecordOwner(name, chunk); },
      py::arg("name"), py::arg("chunk"));
  module.def(
      "crc32",
      [](uintptr_t address, size_t size, uint32_t seed) {
        return base::Crc32({reinterpret_cast<const std::byte*>(address), size}, seed);
      },
      py::arg("address"), py::arg("size"), py::arg("seed"), released);
  module.def("data_file_name", &MakeFileName, py::arg("rank"), py::arg("save_id"),
             py::arg("number"));
  module.def("owner_of", &OwnerOf, py::arg("name"));
  module.def("is_running", &IsRunning, py::arg("process"), py::arg("modified"), released);
  module.def("torch_file_prefix", &MakeTorchPrefix, py::arg("rank"), py::arg("save_id"));
  module.def("record_bytes", &RecordBytes, py::arg("dtype"), py::arg("shape"));
  module.def("record_dtypes", &RecordDtypeNames);
}

}  // namespace hsdp_ckpt::python
