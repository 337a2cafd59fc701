// Float16 as its bits, on the device and on the host.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <cmath>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define DIAGD_BOTH __host__ __device__ __forceinline__
#else
#define DIAGD_BOTH inline
#endif

using half = unsigned short;

namespace diagd {

constexpr int kVector = 8;  // elements that a thread has at a time

struct alignas(16) Vector {
  half values[kVector];
};

DIAGD_BOTH Vector vector_at(const half* place) { return *reinterpret_cast<const Vector*>(place); }

DIAGD_BOTH void put_vector(half* place, const Vector& vector) { *reinterpret_cast<Vector*>(place) = vector; }

}  // namespace diagd

DIAGD_BOTH float to_float(half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x >> 15 ? -size : size;
#endif
}

// The nearest float16, of two the even one.
DIAGD_BOTH half to_half(float x) {
#if defined(__CUDA_ARCH__)
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  const half sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-5f) return sign | static_cast<half>(std::nearbyint(std::ldexp(size, 24)));
  int exponent = 0;
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(std::frexp(size, &exponent), 11)));
  return sign | static_cast<half>(((exponent + 13) << 10) + fraction);  // whose highest bit goes into the exponent
#endif
}
