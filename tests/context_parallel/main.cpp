// SPDX-License-Identifier: Apache-2.0
//
// All ranks run all cases, in one order. A rank whose assertion fails would leave the others waiting: it ends
// the job, once it has said why.
#include <catch2/catch_session.hpp>
#include <catch2/catch_test_case_info.hpp>
#include <catch2/reporters/catch_reporter_event_listener.hpp>
#include <catch2/reporters/catch_reporter_registrars.hpp>

#include <mpi.h>

#include <cstdio>
#include <iostream>

namespace {

class end_of_a_failed_case : public Catch::EventListenerBase {
public:
    using EventListenerBase::EventListenerBase;
    void testCaseEnded(const Catch::TestCaseStats& stats) override {
        if (stats.totals.assertions.allOk())
            return;
        std::cerr << "failed: " << stats.testInfo->name << std::endl;
        std::cout << std::flush;
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
};
CATCH_REGISTER_LISTENER(end_of_a_failed_case)

} // namespace

int main(int argc, char** argv) {
    int threads = 0;
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &threads);
    const int result = Catch::Session().run(argc, argv);
    MPI_Finalize();
    return result;
}
