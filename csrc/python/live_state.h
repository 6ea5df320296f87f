#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "python/held_memory.h"
#include "snapshot/staging_copy.h"

namespace hsdp_ckpt::python {

/// The parts of tensors that this rank saves; bytes.
struct StagingParts {
  struct Part {
    size_t tensor;  ///< among the tensors of the state
    int64_t first;
    int64_t size;
  };
  std::vector<Part> parts;
};

/// The memory of a state's tensors; of those whose bytes are not where an address says, nothing.
using HeldMemories = std::vector<HeldMemory>;

/// What a tensor's version counter shows, and its local one's.
using Versions = std::pair<int64_t, int64_t>;

/// Guarded tensors and their version counters, and their local tensors' counters, as they were when
/// this was made. It keeps Python objects, no `at::Tensor`: torch swaps tensors in place only while
/// nobody in C++ holds them.
class Watch {
 public:
  /// `memory`: of the state's tensors.
  explicit Watch(std::shared_ptr<const HeldMemories> memory) : memory_(std::move(memory)) {}
  void Add(pybind11::object owner, size_t tensor, Versions versions);
  size_t size() const { return entries_.size(); }
  /// Which of the state's tensors is the first one whose owner's counters have moved, or whose
  /// memory is lost; or -1.
  int64_t Changed() const;

 private:
  struct Entry {
    pybind11::object owner;
    size_t tensor;
    Versions versions;
  };
  std::shared_ptr<const HeldMemories> memory_;
  std::vector<Entry> entries_;
};

/// A nested state dict, flat: its values in the order of DCP's flattening, where the bytes of its
/// tensors (a DTensor's: of its local one) lie, and a fingerprint of everything that a save's plan
/// depends on. One pass, since a call of async_save has thousands of tensors to look at and
/// milliseconds to do it in.
///
/// It holds the memory of these tensors (see HeldMemory): what is read later is what it was here.
///
/// All methods need the GIL. An object is used by one thread at a time.
class LiveState {
 public:
  explicit LiveState(const pybind11::object& state_dict);

  /// Equal for equal keys, types of values, and tensors' specs (the same objects), dtypes, shapes,
  /// strides and devices. It holds addresses of types and specs: who keeps it, keeps these alive.
  const std::string& fingerprint() const { return fingerprint_; }
  pybind11::list Values() const;
  std::vector<size_t> places() const;  ///< of the tensors among the values

  pybind11::object Tensor(size_t index) const;
  /// Where the tensor's bytes lie, one after the other in row-major order; 0 where they do not lie
  /// like that.
  uintptr_t address(size_t index) const { return tensors_.at(index).address; }
  /// The elements, in one dimension, that the tensor (a DTensor's: the local one) had when this was
  /// made, in the memory that is held, whatever has become of the tensor since; nothing if that is
  /// lost. Of a tensor with an address only.
  std::optional<at::Tensor> Memory(size_t index) const;
  void Replace(size_t index, const pybind11::object& tensor);

  struct Guarded {
    std::shared_ptr<Watch> watch;   ///< what the others share memory with
    std::vector<size_t> unguarded;  ///< tensors that nobody guards
    int64_t unguarded_bytes = 0;
  };
  /// Which tensors share their memory with a tensor of the optimizers' states, or with one of their
  /// parameters that is among `parameters` (lists of them). By memory, since state dicts hold
  /// detached aliases.
  Guarded FindGuarded(const pybind11::object& parameters, const pybind11::object& optimizers) const;

  /// The copying of the parts of these tensors into an image at `image`, in which each part, but
  /// for the first `skip` ones, has its place; on the CPU alone.
  std::shared_ptr<snapshot::StagingCopy> Copies(const StagingParts& parts, size_t skip,
                                                uintptr_t image, const std::vector<int64_t>& places,
                                                const std::vector<size_t>& tensors) const;

 private:
  struct Place {
    size_t value;
    uintptr_t address;
    int64_t bytes;
    bool on_cpu;
    Versions versions;
    at::ScalarType dtype;
  };
  class Owners;

  void Walk(PyObject* container, bool mapping);
  /// Adds a value. It is owned since KindOf may run anybody's code, which may take the value out of
  /// its container.
  void Take(pybind11::object owned);
  Place PlaceOf(PyObject* tensor, std::string* fingerprint) const;
  /// The memory of a tensor, if its place has an address.
  static HeldMemory Hold(PyObject* tensor, const Place& place);

  std::vector<pybind11::object> values_;
  std::vector<Place> tensors_;
  std::shared_ptr<HeldMemories> memory_ = std::make_shared<HeldMemories>();  // by tensor
  std::string fingerprint_;
};

}  // namespace hsdp_ckpt::python
