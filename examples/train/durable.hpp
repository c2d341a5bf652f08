// SPDX-License-Identifier: Apache-2.0
//
// Folders that appear whole or not at all, also where the machine stops half-way: everything is written under
// a temporary name, synced, and renamed.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>

namespace kv1_train {

/// Removes a folder and what is in it, as far as that is possible. Not std::filesystem's remove_all:
/// PyTorch's packages of LibTorch export a copy of it, older than the program's own library, in which it
/// crashes.
void remove_folder(const std::filesystem::path& folder) noexcept;

class durable_folder {
public:
    /// Throws input_error where `target` exists already, or its temporary neighbour cannot be made. What an
    /// earlier, interrupted attempt left is removed.
    explicit durable_folder(std::filesystem::path target);
    durable_folder(const durable_folder&) = delete;
    durable_folder& operator=(const durable_folder&) = delete;
    /// Without commit(): nothing is left.
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
