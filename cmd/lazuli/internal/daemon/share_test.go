package daemon

import (
	"testing"

	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// A pack is made where there is none, and where one lacks more than 2 %; and only of what a registry has.
func TestWanted(t *testing.T) {
	for _, test := range []struct {
		ref            string
		packed, missed int
		want           bool
	}{
		{"registry.example.com/app:1", 0, 0, true},
		{"registry.example.com/app:1", 1000, 0, false},
		{"registry.example.com/app:1", 1000, 20, false},
		{"registry.example.com/app:1", 1000, 21, true},
		{"oci:./layout", 0, 0, false},
	} {
		ref, err := remote.ParseReference(test.ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := wanted(rootfs.Lesson{Reference: ref, Packed: test.packed, Missed: test.missed}); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
}
