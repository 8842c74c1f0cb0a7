// A device of its own for torch, `other`, whose memory is the CPU's and whose kernels are the CPU's.
//
// To torch, tensors on it are as foreign to those on the CPU as a GPU's are: an operation on both is refused, and
// values move by `to` alone. So a machine without a GPU can tell whether everything is moved where it has to be.
// Whole storages change their name, not their place, on the way into a kernel and out of it.
//
// Its main stream does everything at once. A copy to pinned memory on another stream is done as late as it may be, when
// somebody waits for it; until then the memory holds no numbers. So what is read too early is seen, and a copy is
// refused that does not wait for the main stream, or whose source is gone before it was done.

#include <ATen/ATen.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::Storage;

namespace {

const Device kCpu{c10::kCPU};
const Device kOther{c10::kPrivateUse1, 0};

struct Copy {  // on its way, on a stream of its own
  Tensor target;
  c10::weak_intrusive_ptr<c10::StorageImpl> source;
  std::function<void(const Storage&)> finish;
};

struct Event {
  c10::StreamId stream;
  uint64_t main_clock, copies;
};

struct Stream {
  uint64_t waited_for = 0, asked = 0, done = 0;
  std::deque<Copy> copies;
};

thread_local c10::StreamId current = 0;
thread_local uint64_t main_clock = 0;  // what the main stream was given, in this thread
std::map<c10::StreamId, Stream> streams;
std::set<const void*> pinned;
std::recursive_mutex one_at_a_time;  // of what stands above

bool is_other(const Tensor& tensor) { return tensor.defined() && tensor.device() == kOther; }

Storage renamed(const Storage& storage, Device device) {
  c10::DataPtr memory(const_cast<void*>(storage.data()), new Storage(storage),
                      [](void* kept) { delete static_cast<Storage*>(kept); }, device);
  return {Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetAllocator(c10::kCPU), true};
}

Tensor view_of(const Storage& storage, const Tensor& like) {
  auto key = storage.device() == kCpu ? DispatchKey::CPU : DispatchKey::PrivateUse1;
  auto made = c10::make_intrusive<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return Tensor(std::move(made));
}

Tensor to_cpu(const Tensor& tensor) {
  return is_other(tensor) ? view_of(renamed(tensor.storage(), kCpu), tensor) : tensor;
}

Tensor to_other(const Tensor& tensor) { return view_of(renamed(tensor.storage(), kOther), tensor); }

// What a kernel has made lies in new memory, or in that of an argument, of which it is a view.
Tensor result_of(const Tensor& made, const std::vector<c10::IValue>& arguments) {
  for (const auto& argument : arguments) {
    if (!argument.isTensor() || !is_other(argument.toTensor()) || !made.storage().data()) continue;
    const auto& storage = argument.toTensor().storage();
    if (storage.data() == made.storage().data()) return view_of(storage, made);
  }
  return to_other(made);
}

// What was written in place is the argument itself; an `out` may have been given another size on the way.
Tensor written(const Tensor& argument, const Tensor& made) {
  if (argument.sizes() != made.sizes()) {
    argument.unsafeGetTensorImpl()->set_storage_keep_dtype(renamed(made.storage(), kOther));
    argument.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
  }
  return argument;
}

template <class List>
List each(const List& values, const std::function<Tensor(const Tensor&)>& change) {
  List changed;
  for (const Tensor& value : values) changed.push_back(value.defined() ? change(value) : value);
  return changed;
}

void run_on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  const auto first = stack->size() - schema.arguments().size();
  const std::vector<c10::IValue> arguments(stack->begin() + first, stack->end());
  auto argument_of = [&](const Tensor& tensor) {
    TORCH_CHECK(is_other(tensor) || tensor.dim() == 0, schema.name(), ": one tensor on ", tensor.device(),
                " and one on other");
    return to_cpu(tensor);
  };
  for (auto value = stack->begin() + first; value != stack->end(); ++value) {
    if (value->isTensor() && value->toTensor().defined()) {
      *value = argument_of(value->toTensor());
    } else if (value->isTensorList()) {
      *value = each(value->toTensorList(), argument_of);
    } else if (value->isOptionalTensorList()) {  // indices, which may lie on the CPU
      c10::List<std::optional<Tensor>> indices;
      for (const std::optional<Tensor>& index : value->toOptionalTensorList())
        indices.push_back(index ? std::optional(to_cpu(*index)) : std::nullopt);
      *value = indices;
    } else if (value->isDevice()) {
      *value = kCpu;
    }
  }
  main_clock += current == 0;
  operation.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  const auto last = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto& value = (*stack)[last + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t j = 0; j < arguments.size(); ++j) {
        const auto* own = schema.arguments()[j].alias_info();
        if (own && own->isWrite() && own->beforeSets() == alias->beforeSets())
          value = written(arguments[j].toTensor(), value.toTensor());
      }
    } else if (value.isTensor() && value.toTensor().defined()) {
      value = result_of(value.toTensor(), arguments);
    } else if (value.isTensorList()) {
      value = each(value.toTensorList(), [&](const Tensor& made) { return result_of(made, arguments); });
    }
  }
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return to_other(at::empty(size, at::TensorOptions(kCpu).dtype(dtype), format));
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  return to_other(at::empty_strided(size, stride, at::TensorOptions(kCpu).dtype(dtype)));
}

void finish(c10::StreamId id, uint64_t until) {
  const std::lock_guard lock(one_at_a_time);
  Stream& stream = streams[id];
  for (; stream.done < until; ++stream.done) {
    Copy copy = std::move(stream.copies.front());
    stream.copies.pop_front();
    auto source = copy.source.lock();
    TORCH_CHECK(source, "the memory that a stream copies from was given up before it was done");
    copy.finish(Storage(std::move(source)));
  }
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  const std::lock_guard lock(one_at_a_time);
  if (current == 0 || !non_blocking || !pinned.count(target.storage().data())) {
    to_cpu(target).copy_(to_cpu(source));
    ++main_clock;
    return target;
  }
  Stream& stream = streams[current];
  TORCH_CHECK(stream.waited_for == main_clock, "a stream copies what the main stream may still be writing");
  TORCH_CHECK(target.is_contiguous() && source.is_contiguous() && source.dtype() == target.dtype());
  std::memset(target.data_ptr(), 0xFF, target.nbytes());
  auto finish = [target, place = source.storage_offset() * source.itemsize()](const Storage& from) {
    std::memcpy(target.data_ptr(), static_cast<const char*>(from.data()) + place, target.nbytes());
  };
  stream.copies.push_back({target, c10::weak_intrusive_ptr<c10::StorageImpl>(source.storage().getWeakStorageImpl()),
                           finish});
  ++stream.asked;
  return target;
}

// Attention as it is written, not one of the kernels that a GPU has for it.
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}

c10::Stream stream_of(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kOther, id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  Device exchangeDevice(Device) const override { return kOther; }
  Device getDevice() const override { return kOther; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return stream_of(current); }
  c10::Stream getDefaultStream(Device) const override { return stream_of(0); }
  c10::Stream getNewStream(Device, int) const override {
    const std::lock_guard lock(one_at_a_time);
    const auto id = static_cast<c10::StreamId>(streams.size() + 1);
    streams[id];
    return stream_of(id);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream_of(std::exchange(current, stream.id()));
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    const std::lock_guard lock(one_at_a_time);
    delete static_cast<Event*>(*event);
    *event = new Event{stream.id(), main_clock, stream.id() ? streams[stream.id()].asked : 0};
  }
  void block(void* event, const c10::Stream& stream) const override {
    const std::lock_guard lock(one_at_a_time);
    const auto* awaited = static_cast<Event*>(event);
    if (stream.id() && awaited->stream == 0) streams[stream.id()].waited_for = awaited->main_clock;
    if (awaited->stream) finish(awaited->stream, awaited->copies);
  }
  void synchronizeEvent(void* event) const override {
    const auto* awaited = static_cast<Event*>(event);
    if (awaited->stream) finish(awaited->stream, awaited->copies);
  }
  bool queryEvent(void* event) const override {
    const std::lock_guard lock(one_at_a_time);
    const auto* awaited = static_cast<Event*>(event);
    return !awaited->stream || streams[awaited->stream].done >= awaited->copies;
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const std::lock_guard lock(one_at_a_time);
    auto memory = c10::GetAllocator(c10::kCPU)->allocate(size);
    void* place = memory.release_context();
    pinned.insert(place);
    return {place, place, &free, kCpu};
  }
  static void free(void* place) {
    const std::lock_guard lock(one_at_a_time);
    pinned.erase(place);
    c10::GetAllocator(c10::kCPU)->raw_deleter()(place);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* place) const override {
    const std::lock_guard lock(one_at_a_time);
    return pinned.count(place) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    static Pinned allocator;
    return &allocator;
  }
};

const bool kHooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_fused_sdp_choice", plain_attention);
}

}  // namespace
