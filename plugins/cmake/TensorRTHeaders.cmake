# Sets TENSORRT_INCLUDE_DIR to a folder with NvInfer.h, or leaves it empty with a warning.
find_path(TENSORRT_INCLUDE_DIR NvInfer.h
  HINTS ${TensorRT_ROOT} ENV TensorRT_ROOT PATH_SUFFIXES include)

if(NOT TENSORRT_INCLUDE_DIR AND CONVBERT_FETCH_TENSORRT_HEADERS)
  # The only registry package that ships the C++ headers (TensorRT 10.14, Apache-2.0). It is
  # unpacked, never installed or imported.
  set(fetched ${CMAKE_BINARY_DIR}/tensorrt_headers)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(NOT EXISTS ${fetched}/kernel_lens/include/tensorrt/NvInfer.h AND Python3_Interpreter_FOUND)
    # Inside `pip install` PYTHONPATH shows an isolated environment, which has no pip.
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH
              ${Python3_EXECUTABLE} -m pip download --quiet --disable-pip-version-check
              --no-deps --only-binary :all: --dest ${fetched} kernel-lens==2.0.1
      RESULT_VARIABLE failed ERROR_VARIABLE why OUTPUT_QUIET)
    file(GLOB wheel ${fetched}/kernel_lens-*.whl)
    if(failed EQUAL 0 AND wheel)
      file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${fetched}
           PATTERNS "kernel_lens/include/tensorrt/*")
    else()
      message(STATUS "convbert: pip download kernel-lens==2.0.1 failed: ${why}")
    endif()
  endif()
  find_path(TENSORRT_INCLUDE_DIR NvInfer.h
    PATHS ${fetched}/kernel_lens/include/tensorrt NO_DEFAULT_PATH)
endif()

if(TENSORRT_INCLUDE_DIR)
  message(STATUS "convbert: TensorRT headers: ${TENSORRT_INCLUDE_DIR}")
else()
  message(WARNING "convbert: NvInfer.h not found, the TensorRT plugin library is left out. "
    "Pass -DTensorRT_ROOT=/path/to/TensorRT, or -DCONVBERT_FETCH_TENSORRT_HEADERS=ON.")
endif()
