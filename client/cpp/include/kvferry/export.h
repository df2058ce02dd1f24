// What the shared library exports.
#pragma once

#define KVFERRY_API __attribute__((visibility("default")))
