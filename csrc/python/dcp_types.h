#pragma once

#include "python/module.h"

namespace hsdp_ckpt::python {

/// DCP's metadata classes and their fields' names, looked up once a call. Needs the GIL.
struct DcpTypes {
  static pybind11::str Intern(const char* name) {
    return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name));
  }

  pybind11::tuple no_arguments_;
  pybind11::module_ torch_ = pybind11::module_::import("torch");
  pybind11::module_ dcp_ = pybind11::module_::import("torch.distributed.checkpoint.metadata");
  pybind11::object metadata_ = dcp_.attr("Metadata");
  pybind11::object tensor_ = dcp_.attr("TensorStorageMetadata");
  pybind11::object bytes_ = dcp_.attr("BytesStorageMetadata");
  pybind11::object chunk_ = dcp_.attr("ChunkStorageMetadata");
  pybind11::object tensor_properties_ = dcp_.attr("TensorProperties");
  pybind11::object index_ = dcp_.attr("MetadataIndex");
  pybind11::object storage_meta_class_ = dcp_.attr("StorageMeta");
  pybind11::object storage_info_ =
      pybind11::module_::import("torch.distributed.checkpoint.filesystem").attr("_StorageInfo");
  pybind11::object size_ = torch_.attr("Size");
  // In the order of MemoryFormat.
  pybind11::object memory_formats_[3] = {torch_.attr("contiguous_format"),
                                         torch_.attr("channels_last"),
                                         torch_.attr("preserve_format")};
  bool knows_strides_ =
      pybind11::cast<pybind11::dict>(tensor_properties_.attr("__dataclass_fields__"))
          .contains("strides");
  pybind11::str state_dict_metadata_ = Intern("state_dict_metadata"),
                planner_data_ = Intern("planner_data"), storage_data_ = Intern("storage_data"),
                storage_meta_ = Intern("storage_meta"), version_ = Intern("version"),
                dtype_ = Intern("dtype"), layout_ = Intern("layout"),
                requires_grad_ = Intern("requires_grad"), memory_format_ = Intern("memory_format"),
                pin_memory_ = Intern("pin_memory"), strides_ = Intern("strides"),
                properties_ = Intern("properties"), size_name_ = Intern("size"),
                chunks_ = Intern("chunks"), offsets_ = Intern("offsets"), sizes_ = Intern("sizes"),
                fqn_ = Intern("fqn"), offset_ = Intern("offset"), index_name_ = Intern("index"),
                relative_path_ = Intern("relative_path"), length_ = Intern("length"),
                transform_descriptors_ = Intern("transform_descriptors"),
                checkpoint_id_ = Intern("checkpoint_id"), save_id_ = Intern("save_id"),
                load_id_ = Intern("load_id"), modules_ = Intern("modules");
};

}  // namespace hsdp_ckpt::python
