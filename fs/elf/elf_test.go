package elf

import (
	debug "debug/elf"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// memory reads a file that is in memory, and fails if it is asked for what is not there.
func memory(t testing.TB, b []byte) func(off, n int64) []byte {
	return func(off, n int64) []byte {
		if off < 0 || n <= 0 || n > int64(len(b))-off {
			t.Fatalf("%d bytes at %d of %d", n, off, len(b))
		}
		return b[off : off+n]
	}
}

// programs are ELF files of this machine.
func programs(t testing.TB, most int) (list []string) {
	for _, pattern := range []string{"/usr/bin/*", "/usr/lib/*/*.so.*", "/usr/lib64/*.so.*", "/lib/*.so.*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, found[:min(len(found), most)]...)
	}
	return list
}

// TestParse: of the ELF files of this machine the loader needs what debug/elf says.
func TestParse(t *testing.T) {
	parsed, needed := 0, 0
	for _, name := range programs(t, 60) {
		f, err := debug.Open(name)
		if err != nil {
			continue // a script, a folder
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		got := Parse(int64(len(b)), memory(t, b))
		if got == nil {
			t.Errorf("%s is not taken for an ELF file", name)
			continue
		}
		parsed++
		libs, _ := f.ImportedLibraries()
		runpath, _ := f.DynString(debug.DT_RUNPATH)
		needed += len(libs)
		want := &File{Class: f.Class, Machine: f.Machine, Needed: libs}
		for _, p := range runpath {
			want.RunPath = append(want.RunPath, Split(p)...)
		}
		for _, p := range f.Progs {
			switch p.Type {
			case debug.PT_INTERP:
				text := make([]byte, p.Filesz-1)
				if _, err := p.ReadAt(text, 0); err != nil {
					t.Fatal(err)
				}
				want.Interpreter = string(text)
			case debug.PT_DYNAMIC:
				want.Dynamic = int64(p.Off)
			case debug.PT_LOAD:
				want.Loads = append(want.Loads, Load{p.Vaddr, p.Off, p.Filesz})
			}
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(File{})); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
		f.Close()
	}
	if needed == 0 {
		t.Skip("this machine has no ELF files that need libraries")
	}
	t.Logf("%d files", parsed)
}

func TestOrigin(t *testing.T) {
	got := Origin([]string{"$ORIGIN/../lib", "${ORIGIN}", "/opt/$LIB"}, "usr/bin/x")
	if diff := cmp.Diff([]string{"/usr/bin/../lib", "/usr/bin", "/opt/lib64", "/opt/lib"}, got); diff != "" {
		t.Error(diff)
	}
}

// FuzzParse: no panic, no read beyond the file, and no more than what is bounded, whatever a file says.
func FuzzParse(f *testing.F) {
	for _, name := range programs(f, 2) {
		if b, err := os.ReadFile(name); err == nil && len(b) < 1<<20 {
			f.Add(b[:min(len(b), 64<<10)])
		}
	}
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := 0
		in := memory(t, b)
		x := Parse(int64(len(b)), func(off, n int64) []byte {
			read += int(n)
			return in(off, n)
		})
		if most := 64 + maxSegments*56 + maxSegments*(MaxDynamic+maxString) + maxNeeded*maxString; read > most {
			t.Errorf("read %d bytes", read)
		}
		if x == nil {
			return
		}
		if len(x.Needed)+len(x.RPath)+len(x.RunPath) > maxNeeded*maxPaths {
			t.Errorf("%d libraries in %d and %d folders", len(x.Needed), len(x.RPath), len(x.RunPath))
		}
		for _, size := range []int64{int64(len(b)), int64(len(b)) + 1<<30} {
			for _, p := range x.Parts(size) {
				if p.Off < 0 || p.Size < 0 || p.Size > size-p.Off {
					t.Errorf("%+v of %d bytes", p, size)
				}
			}
		}
		Origin(x.RunPath, "a/b")
		x.Folders()
	})
}
