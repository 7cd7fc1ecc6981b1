// A tool that listens to NVTX as Nsight does: the library that NVTX_INJECTION64_PATH names. It writes every range of
// every domain to the file that NVTX_LISTENER_OUT names: "DOMAIN > NAME" where one begins, "DOMAIN <" where it ends.
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE* out;

// Handles of domains and registered strings are ours to choose: the text itself.
static nvtxDomainHandle_t create_domain(const char* name) { return (nvtxDomainHandle_t)strdup(name); }

static nvtxStringHandle_t register_string(nvtxDomainHandle_t domain, const char* text) {
  (void)domain;
  return (nvtxStringHandle_t)strdup(text);
}

static int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const int registered = event->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
  const char* name = registered ? (const char*)event->message.registered : event->message.ascii;
  return fprintf(out, "%s > %s\n", (const char*)domain, name);
}

static int pop(nvtxDomainHandle_t domain) { return fprintf(out, "%s <\n", (const char*)domain); }

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  const NvtxExportTableCallbacks* callbacks = export_table(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable table = NULL;
  unsigned int size = 0;
  out = fopen(getenv("NVTX_LISTENER_OUT"), "w");
  if (!out || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create_domain;
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)register_string;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
