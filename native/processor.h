// Which instructions the processor has, and the system keeps registers for; compilers that come without their runtime
// libraries (Zig's) answer __builtin_cpu_supports with none.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace diagd {

struct Processor {
  bool avx2 = false, fma = false, avx512f = false, avx512dq = false, avx512vl = false, avx512vnni = false;
};

#if defined(DIAGD_PROCESSOR)  // another one's, to test what that runs
inline Processor read_processor() { return DIAGD_PROCESSOR; }
#else
inline Processor read_processor() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const auto bit = [](unsigned word, int number) { return (word >> number & 1) != 0; };
  const bool fma = bit(c, 12), asks = bit(c, 27);
  if (!asks || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  unsigned kept = 0, above = 0;
  __asm__("xgetbv" : "=a"(kept), "=d"(above) : "c"(0));
  const bool keeps_256 = (kept & 0x6) == 0x6, keeps_512 = (kept & 0xe6) == 0xe6;
  return {keeps_256 && bit(b, 5),  keeps_256 && fma,        keeps_512 && bit(b, 16),
          keeps_512 && bit(b, 17), keeps_512 && bit(b, 31), keeps_512 && bit(c, 11)};
}
#endif

inline const Processor& processor() {
  static const Processor found = read_processor();
  return found;
}

}  // namespace diagd
#endif
