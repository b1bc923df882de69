/* Narrow floating point: conversions and arithmetic rounded once, to nearest even. */
#include <math.h>

#include "machine.h"

static float half_values[65536];

static float half_value(uint16_t h) {
    int sign = h >> 15, exponent = h >> 10 & 31; uint32_t fraction = h & 1023;
    float f = exponent == 0 ? ldexpf((float)fraction, -24)
            : exponent == 31 ? (fraction ? NAN : INFINITY) : ldexpf((float)(fraction | 1024), exponent - 25);
    return sign ? -f : f;
}
static void fill_halves(void) {
    if (half_values[0x3c00] == 1.0f) return;
    for (uint32_t h = 0; h < 65536; h++) half_values[h] = half_value((uint16_t)h);
}
static inline float widen(uint32_t x, int bf16) { return bf16 ? as_float((x & 0xffff) << 16) : half_values[x & 0xffff]; }

static uint32_t to_bf16(float f) {
    uint32_t x = as_bits(f);
    if (f != f) return 0x7fff;
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static uint32_t to_half(float f) {
    uint32_t x = as_bits(f), sign = x >> 16 & 0x8000, mag = x & 0x7fffffff;
    if (mag > 0x7f800000) return 0x7fff;
    if (mag >= 0x477ff000) return sign | 0x7c00;
    if (mag < 0x38800000) { /* subnormal: a multiple of 2^-24 */
        float scaled = ldexpf(as_float(mag), 24);
        return sign | (uint32_t)rintf(scaled);
    }
    mag -= 112u << 23;
    return sign | ((mag + 0xfff + (mag >> 13 & 1)) >> 13);
}
static inline uint32_t narrow(float f, int bf16) { return bf16 ? to_bf16(f) : to_half(f); }

/* An inexact result becomes the neighbour with an odd last bit: a later rounding then sees on which side it was. */
static double odd_sum(double p, double c) {
    double s = p + c, t = s - p, error = (p - (s - t)) + (c - t);
    if (!isfinite(s) || error == 0) return s;
    uint64_t x; memcpy(&x, &s, 8);
    if (!(x & 1)) { if ((error > 0) == (s > 0)) x |= 1; else x -= 1; }
    memcpy(&s, &x, 8);
    return s;
}
static float odd_float(double s) {
    float f = (float)s;
    if (f != f || (double)f == s) return f;
    uint32_t x = as_bits(f);
    if (fabs((double)f) > fabs(s)) x--;
    return as_float(x | 1);
}
static uint32_t fused(uint32_t a, uint32_t b, uint32_t c, int bf16) {
    return narrow(odd_float(odd_sum((double)widen(a, bf16) * widen(b, bf16), widen(c, bf16))), bf16);
}
static inline uint32_t fused_pair(uint32_t a, uint32_t b, uint32_t c, int bf16) {
    return fused(a, b, c, bf16) | fused(a >> 16, b >> 16, c >> 16, bf16) << 16;
}
static inline float flush(float f) { return fabsf(f) < 1.17549435e-38f ? copysignf(0, f) : f; }
static inline float minimum(float x, float y) {
    if (x != x) return y;
    if (y != y) return x;
    if (x == 0 && y == 0) return signbit(x) ? x : y;
    return x < y ? x : y;
}
static inline float maximum(float x, float y) { return -minimum(-x, -y); }
static inline int32_t truncate(float f) {
    return f != f ? 0 : f >= 2147483648.0f ? INT32_MAX : f < -2147483648.0f ? INT32_MIN : (int32_t)f;
}
