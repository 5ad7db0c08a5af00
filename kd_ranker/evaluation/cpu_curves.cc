// Passes over the candidates of a request, one after the other, on a CPU.
//
// `funnel.py` has the same for XLA, which takes a microsecond for each operation on a candidate.
// `cpu_curves.py` describes the functions. All arrays have any leading axes.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// For each newcomer, the place that leaves the sorted best `shown`, maybe its own.
ffi::Error LeavingPlaces(ffi::Buffer<ffi::S32> arriving, int64_t shown,
                         ffi::ResultBuffer<ffi::S32> leaving) {
  const int64_t candidates = arriving.dimensions().back();
  const int64_t size = arriving.element_count();
  const int32_t* newcomer = arriving.typed_data();
  int32_t* leaves = leaving->typed_data();
  std::vector<int32_t> slots(shown);
  for (int64_t start = 0; start < size; start += candidates) {
    std::fill(slots.begin(), slots.end(), candidates);
    for (int64_t at = start; at < start + candidates; ++at) {
      const int32_t place = newcomer[at];
      leaves[at] = std::max(place, slots.back());
      if (place >= slots.back()) continue;
      const auto better = std::upper_bound(slots.begin(), slots.end(), place);
      std::move_backward(better, slots.end() - 1, slots.end());
      *better = place;
    }
  }
  return ffi::Error::Success();
}

// The sums over the first k of the candidates, each of which has `width` numbers.
template <typename Number>
void AddUp(const Number* added, Number* sums, int64_t size, int64_t candidates, int64_t width) {
  const int64_t of_request = candidates * width;
  for (int64_t start = 0; start < size; start += of_request) {
    std::copy(added + start, added + start + width, sums + start);
    for (int64_t at = start + width; at < start + of_request; ++at) {
      sums[at] = sums[at - width] + added[at];
    }
  }
}

ffi::Error RunningSums(ffi::AnyBuffer added, int64_t candidates, int64_t width,
                       ffi::Result<ffi::AnyBuffer> sums) {
  const int64_t size = added.element_count();
  if (added.element_type() == ffi::F32) {
    AddUp(added.typed_data<float>(), sums->typed_data<float>(), size, candidates, width);
  } else if (added.element_type() == ffi::S32) {
    AddUp(added.typed_data<int32_t>(), sums->typed_data<int32_t>(), size, candidates, width);
  } else {
    return ffi::Error::InvalidArgument("running sums take float32 or int32");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kd_ranker_leaving_places, LeavingPlaces,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()  // arriving [..., N]
                                  .Attr<int64_t>("shown")
                                  .Ret<ffi::Buffer<ffi::S32>>());  // leaving [..., N]

XLA_FFI_DEFINE_HANDLER_SYMBOL(kd_ranker_running_sums, RunningSums,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()  // added [..., N, width]
                                  .Attr<int64_t>("candidates")
                                  .Attr<int64_t>("width")
                                  .Ret<ffi::AnyBuffer>());  // sums [..., N, width]
