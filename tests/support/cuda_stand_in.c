/* A stand-in for libcuda that copies host memory: what our calls look like from the other side, without a GPU.
   "Device" memory is host memory that the test allocated. Checks what it can: contexts are pushed around every call,
   streams and events are ones that it gave out, nothing is freed twice. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MAX = 4096, INVALID = 1, NOT_READY = 600, ALREADY = 712 };
static char live[MAX];                      /* streams and events given out, by number */
static uintptr_t next = 1;
static __thread int depth = 0;              /* contexts pushed on this thread */
static volatile int held = 0;               /* events are not ready while held */
static int num_synchronized = 0, fail_record = 0, num_waits = 0, fail_pin_at = -1, num_pins = 0, num_live_pins = 0;
static uintptr_t pins[MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void stand_in_hold(int on) { held = on; }
void stand_in_fail_pin_at(int n) { fail_pin_at = n; num_pins = 0; }
void stand_in_fail_record(int on) { fail_record = on; }
int stand_in_num_synchronized(void) { return num_synchronized; }
int stand_in_num_waits(void) { return num_waits; }
int stand_in_num_pinned(void) { return num_live_pins; }
int stand_in_num_live(void) { int n = 0; for (int i = 0; i < MAX; i++) n += live[i]; return n; }

static int give(void **out) { pthread_mutex_lock(&lock); live[next] = 1; *out = (void *)next++; pthread_mutex_unlock(&lock); return 0; }
static int known(void *p) { return (uintptr_t)p < MAX && live[(uintptr_t)p]; }
static int take(void *p) { if (!depth || !known(p)) return INVALID; live[(uintptr_t)p] = 0; return 0; }

int cuInit(unsigned flags) { return flags ? INVALID : 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **ctx, int device) { *ctx = (void *)(uintptr_t)(0x1000 + device); return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 40; }
int cuCtxPushCurrent_v2(void *ctx) { if ((uintptr_t)ctx < 0x1000) return INVALID; depth++; return 0; }
int cuCtxPopCurrent_v2(void **ctx) { if (!depth) return INVALID; depth--; *ctx = 0; return 0; }
int cuStreamCreate(void **s, unsigned flags) { return depth && flags == 1 ? give(s) : INVALID; }
int cuStreamDestroy_v2(void *s) { return take(s); }
int cuStreamSynchronize(void *s) { if (!depth || !known(s)) return INVALID; num_synchronized++; return 0; }
int cuStreamWaitEvent(void *s, void *e, unsigned flags) { if (!depth || !known(s) || !known(e) || flags) return INVALID; num_waits++; return 0; }
int cuEventCreate(void **e, unsigned flags) { return depth && flags == 2 ? give(e) : INVALID; }
int cuEventRecord(void *e, void *s) { if (fail_record) return INVALID; return depth && known(e) && (!s || known(s)) ? 0 : INVALID; }
int cuEventQuery(void *e) { if (!depth || !known(e)) return INVALID; return held ? NOT_READY : 0; }
int cuEventDestroy_v2(void *e) { return take(e); }
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void *s) {
  if (!depth || !known(s)) return INVALID;
  memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, n);
  return 0;
}
int cuMemHostRegister_v2(void *p, size_t n, unsigned flags) {
  if (!depth || !n || !(flags & 1)) return INVALID;
  if (num_pins++ == fail_pin_at) return INVALID;
  for (int i = 0; i < MAX; i++) if (pins[i] == (uintptr_t)p) return ALREADY;
  for (int i = 0; i < MAX; i++) if (!pins[i]) { pins[i] = (uintptr_t)p; num_live_pins++; return 0; }
  return INVALID;
}
int cuMemHostUnregister(void *p) {
  for (int i = 0; i < MAX; i++) if (pins[i] == (uintptr_t)p) { pins[i] = 0; num_live_pins--; return depth ? 0 : INVALID; }
  return INVALID;
}
int cuGetErrorString(int status, const char **text) { *text = status == INVALID ? "invalid argument" : "something else"; return 0; }
