// Host build: the same code over a loop of threads, so that it can be tested where there is no GPU.
#include "step_kernels.h"

extern "C" void diagd_advance(const diagd::AdvanceArguments* arguments, int32_t threads) {
  const int32_t* record = arguments->records + *arguments->cursor;
  for (int thread = 0; thread < threads; ++thread) {
    diagd::advance_thread(*arguments, record, thread, threads);
  }
  *arguments->cursor = record[diagd::kNext];
}

extern "C" void diagd_append(const diagd::AppendArguments* arguments, int32_t threads) {
  for (int thread = 0; thread < threads; ++thread) {
    diagd::append_thread(*arguments, thread, threads);
  }
}

extern "C" int32_t diagd_advance_arguments_size() { return sizeof(diagd::AdvanceArguments); }

extern "C" int32_t diagd_append_arguments_size() { return sizeof(diagd::AppendArguments); }
