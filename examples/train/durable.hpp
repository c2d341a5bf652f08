// SPDX-License-Identifier: Apache-2.0
//
// Folders that appear whole or not at all, even if the machine stops half-way. Files are written under a
// temporary name, synced, and renamed.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace kv1_train {

/// Removes a folder and its contents, as far as that is possible. std::filesystem::remove_all() crashes here:
/// PyTorch's packages of LibTorch export a copy of it that is older than the program's standard library.
void remove_folder(const std::filesystem::path& folder) noexcept;

class durable_folder {
public:
    /// Makes a temporary folder beside `target`, and removes one that an interrupted attempt has left. Throws
    /// input_error if `target` exists, or if the temporary folder cannot be made.
    explicit durable_folder(std::filesystem::path target);
    durable_folder(const durable_folder&) = delete;
    durable_folder& operator=(const durable_folder&) = delete;
    /// Removes the temporary folder, unless commit() was called.
    ~durable_folder();

    /// Writes and syncs a file. Throws input_error.
    void write(std::string_view name, std::span<const std::byte> contents) const;
    /// Gives the folder its name.
    void commit();

private:
    std::filesystem::path target_, temporary_;
    bool committed_ = false;
};

} // namespace kv1_train
