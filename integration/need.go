package integration

import (
	"os"
	"os/exec"
	"testing"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// skip skips the test, unless LAZULI_CI is set: there the machine has everything, and a
// skipped test is a test that does not run.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("LAZULI_CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
}

func needProgram(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		skip(t, "needs the program %s: %v", name, err)
	}
}
