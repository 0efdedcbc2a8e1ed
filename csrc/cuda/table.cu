// Getting tables to the device.
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/run.h"

namespace sam_fused::cuda {
namespace {

struct UploadArguments {
  int64_t* to;
  int64_t count;
  int64_t words[kUploadWords];
};

__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ UploadArguments a) {
  for (int64_t i = threadIdx.x; i < a.count; i += blockDim.x) a.to[i] = a.words[i];
}

}  // namespace

void check_chunks(const Plan& plan) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (plan.chunks() > kMost) {
    throw std::runtime_error("sam_fused: expected at most " + std::to_string(kMost) + " chunks of " +
                             std::to_string(kBlockChunk) + " elements in a call, got " + std::to_string(plan.chunks()) +
                             ": split the tensors over several calls");
  }
}

void upload(const int64_t* words, int64_t count, int64_t* to, Stream stream) {
  UploadArguments arguments;
  for (int64_t done = 0; done < count; done += kUploadWords) {
    arguments.to = to + done;
    arguments.count = std::min(kUploadWords, count - done);
    std::copy_n(words + done, arguments.count, arguments.words);
    launch(upload_kernel, 1, stream, arguments);
  }
}

void write_table(const Set& set) {
  const TableLayout layout = set.layout();
  std::vector<int64_t> words(layout.norm_sums());
  words[TableLayout::kTicket] = 0;
  for (int64_t t = 0; t <= layout.tensors; ++t) words[TableLayout::kFirstChunk + t] = set.plan.first_chunk(t);
  const auto* rows = reinterpret_cast<const int64_t*>(set.rows.data);
  std::copy_n(rows, layout.tensors * kRowWords, words.begin() + layout.rows());
  upload(words.data(), static_cast<int64_t>(words.size()), set.table, set.stream);
}

}  // namespace sam_fused::cuda
