/* Stands in for libcuda, or with -DHIP for libamdhip64: main memory is the card's.

   Every call is a line of $FAKE_LOG, where that is set: its name, then its arguments. FAKE_FAIL="cuMemAlloc_v2=2" makes
   a call fail. A "binary" is the sizes of its kernel's parameters and a text, so that a launch can write down the bytes
   it is given. Whoever calls fake_listen is told of launches and of graphs, and may carry them out. */

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HIP
#define NAME(cuda, hip) hip
#else
#define NAME(cuda, hip) cuda
#endif
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define CALL(cuda, hip, parameters, ...) \
  int NAME(cuda, hip) parameters { int bad = note(STRING(NAME(cuda, hip)), __VA_ARGS__); if (bad) return bad;

static int note(const char *name, const char *format, ...) {
  if (getenv("FAKE_LOG")) {
    FILE *log = fopen(getenv("FAKE_LOG"), "a");
    fprintf(log, "%s", name);
    va_list values;
    va_start(values, format);
    if (*format) fputc(' ', log);
    vfprintf(log, format, values);
    va_end(values);
    fputc('\n', log);
    fclose(log);
  }
  const char *fail = getenv("FAKE_FAIL");
  size_t length = strlen(name);
  return fail && !strncmp(fail, name, length) && fail[length] == '=' ? atoi(fail + length + 1) : 0;
}
static int number(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
static uintptr_t handle = 0x1000;
typedef void *H;
typedef uint64_t P;
typedef void (*Listener)(const char *what, H handle, unsigned x, unsigned y, unsigned z, H *args);
static Listener listener = NULL;
void fake_listen(Listener l) { listener = l; }
static void tell(const char *what, H handle) { if (listener) listener(what, handle, 0, 0, 0, NULL); }

CALL(cuInit, hipInit, (unsigned f), "%u", f) return 0; }
CALL(cuDriverGetVersion, hipDriverGetVersion, (int *v), "")
  *v = number("FAKE_VERSION", NAME(12080, 60342134)); return 0; }
CALL(cuDeviceGetCount, hipGetDeviceCount, (int *n), "") *n = number("FAKE_COUNT", 2); return 0; }
CALL(cuDeviceGet, hipDeviceGet, (int *d, int i), "%d", i) *d = i; return 0; }
CALL(cuDeviceGetName, hipDeviceGetName, (char *s, int n, int d), "%d %d", n, d) strcpy(s, "Fake GPU"); return 0; }
CALL(cuDeviceGetAttribute, hipDeviceGetAttribute, (int *v, int which, int d), "%d %d", which, d)
  int cc = number("FAKE_CC", 90);
  switch (which) {
    case 75: *v = cc / 10; return 0;
    case 76: *v = cc % 10; return 0;
    case 97: *v = number("FAKE_SHARED", 232448); return 0;
    case 74: *v = 65536; return 0;
    default: *v = 132; return 0; } }
CALL(cuModuleLoadData, hipModuleLoadData, (H *m, const char *code), "%s", code) *m = strdup(code); return 0; }
CALL(cuModuleGetFunction, hipModuleGetFunction, (H *f, H m, const char *name), "%s", name) *f = m; return 0; }
CALL(cuMemGetInfo_v2, hipMemGetInfo, (size_t *free, size_t *all), "") *free = 5; *all = 8; return 0; }
CALL(cuMemAlloc_v2, hipMalloc, (P *p, size_t n), "%zu", n)
  *p = (P)aligned_alloc(256, (n + 255) / 256 * 256);
  memset((H)*p, 0xff, n < 1 << 20 ? n : 1 << 20); return 0; }  /* a card's memory holds anything: here, NaN */
CALL(cuMemFree_v2, hipFree, (P p), "%d", p % 256 == 0) free((H)p); return 0; }
CALL(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync, (P d, H s, size_t n, H q), "%zu %p", n, q)
  memcpy((H)d, s, n); return 0; }
CALL(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync, (H d, P s, size_t n, H q), "%zu %p", n, q)
  memcpy(d, (H)s, n); return 0; }
CALL(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync, (P d, P s, size_t n, H q), "%zu %p", n, q)
  memcpy((H)d, (H)s, n); return 0; }
CALL(cuMemsetD8Async, hipMemsetD8Async, (P d, unsigned char b, size_t n, H q), "%u %zu %p", b, n, q)
  memset((H)d, b, n); return 0; }
CALL(cuStreamCreate, hipStreamCreateWithFlags, (H *q, unsigned f), "%u", f) *q = (H)(handle += 16); return 0; }
CALL(cuStreamDestroy_v2, hipStreamDestroy, (H q), "%p", q) return 0; }
CALL(cuStreamSynchronize, hipStreamSynchronize, (H q), "%p", q) return 0; }
CALL(cuEventCreate, hipEventCreateWithFlags, (H *e, unsigned f), "%u", f) *e = (H)(handle += 16); return 0; }
CALL(cuEventDestroy_v2, hipEventDestroy, (H e), "%p", e) return 0; }
CALL(cuEventRecord, hipEventRecord, (H e, H q), "%p %p", e, q) return 0; }
CALL(cuEventSynchronize, hipEventSynchronize, (H e), "%p", e) return 0; }
CALL(cuEventElapsedTime, hipEventElapsedTime, (float *t, H a, H b), "%p %p", a, b) *t = 1.5; return 0; }
CALL(cuStreamBeginCapture_v2, hipStreamBeginCapture, (H q, int mode), "%p %d", q, mode) tell("begin", q); return 0; }
CALL(cuStreamEndCapture, hipStreamEndCapture, (H q, H *g), "%p", q)
  *g = (H)(handle += 16); tell("end", *g); return 0; }
#ifndef OLD
CALL(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags, (H *x, H g, uint64_t f), "%p %d", g, (int)f)
  *x = listener ? g : (H)(handle += 16); return 0; }
#endif
CALL(cuGraphDestroy, hipGraphDestroy, (H g), "%p", g) return 0; }
CALL(cuGraphExecDestroy, hipGraphExecDestroy, (H x), "%p", x) return 0; }
CALL(cuGraphLaunch, hipGraphLaunch, (H x, H q), "%p %p", x, q) tell("replay", x); return 0; }

CALL(cuLaunchKernel, hipModuleLaunchKernel,
     (H f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, H q, H *args,
      H extra),
     "%u,%u,%u %u,%u,%u %u %p %d", x, y, z, bx, by, bz, shared, q, extra == NULL)
  if (listener) listener("launch", f, x, y, z, args);
  if (!getenv("FAKE_LOG")) return 0;
  FILE *log = fopen(getenv("FAKE_LOG"), "a");
  fprintf(log, "arguments");
  char sizes[256], *rest = NULL;
  strncpy(sizes, f, 255);
  sizes[255] = 0;
  for (char *size = strtok_r(sizes, " ,", &rest); size && atoi(size); size = strtok_r(NULL, " ,", &rest)) {
    fputc(' ', log);
    for (int i = 0; i < atoi(size); i++) fprintf(log, "%02x", ((unsigned char *)*args)[i]);
    args++;
  }
  fputc('\n', log);
  fclose(log);
  return 0; }

#ifdef HIP
int hipSetDevice(int n) { return note("hipSetDevice", "%d", n); }
int hipGetDevicePropertiesR0600(char *p, int n) {
  strcpy(p, "AMD gfx000 card");
  strcpy(p + 1160, getenv("FAKE_ARCH") ? getenv("FAKE_ARCH") : "gfx942:sramecc+:xnack-");
  return note("hipGetDevicePropertiesR0600", "%d", n); }
const char *hipGetErrorName(int code) { return code == 2 ? "hipErrorOutOfMemory" : NULL; }
#else
int cuDevicePrimaryCtxRetain(H *c, int d) { *c = (H)0xc0; return note("cuDevicePrimaryCtxRetain", "%d", d); }
int cuDevicePrimaryCtxRelease_v2(int d) { return note("cuDevicePrimaryCtxRelease_v2", "%d", d); }
int cuCtxSetCurrent(H c) { return note("cuCtxSetCurrent", "%p", c); }
int cuFuncSetAttribute(H f, int which, int value) { return note("cuFuncSetAttribute", "%d %d", which, value); }
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 209 ?
    "CUDA_ERROR_NO_BINARY_FOR_GPU" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : NULL;
  return *name ? 0 : 1; }
#endif
