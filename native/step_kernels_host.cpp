// Host build: the device's code over a loop of threads, for tests; and draws as fast as a processor makes them.
#include "row_sampling.h"
#include "step_kernels.h"

// Tokens of rows; returns 1 + a row whose largest logit is not finite, or 0.
extern "C" int32_t diagd_draw(const diagd::DrawArguments* arguments) {
  thread_local diagd::Scratch scratch;
  int32_t refused = 0;
  for (int row = arguments->rows - 1; row >= 0; --row) {
    const int32_t token = diagd::draw(*arguments, row, scratch);
    arguments->tokens[row] = token;
    if (token < 0) refused = row + 1;
  }
  return refused;
}

extern "C" void diagd_advance(const diagd::AdvanceArguments* arguments, int32_t threads) {
  const int32_t header = arguments->cursor[0];
  const int32_t* record = arguments->records + header;
  for (int thread = 0; thread < threads; ++thread) {
    diagd::advance_thread(*arguments, record, thread, threads);
  }
  arguments->cursor[0] = record[diagd::kNext];
  arguments->cursor[1] = header;
}

extern "C" void diagd_sample(const diagd::SampleArguments* arguments, int32_t threads) {
  diagd::RowState state;
  for (int draw = 0; draw < arguments->width; ++draw) {
    diagd::sample_draw({threads}, state, *arguments, draw);
  }
}

extern "C" void diagd_append(const diagd::AppendArguments* arguments, int32_t threads) {
  for (int thread = 0; thread < threads; ++thread) {
    diagd::append_thread(*arguments, thread, threads);
  }
}

extern "C" int32_t diagd_advance_arguments_size() { return sizeof(diagd::AdvanceArguments); }

extern "C" int32_t diagd_sample_arguments_size() { return sizeof(diagd::SampleArguments); }

extern "C" int32_t diagd_append_arguments_size() { return sizeof(diagd::AppendArguments); }

extern "C" int32_t diagd_draw_arguments_size() { return sizeof(diagd::DrawArguments); }
