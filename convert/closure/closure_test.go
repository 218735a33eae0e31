package closure

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"lazuli/fs/profile"
)

// memory is a tree of files in memory. What is in a bin folder is executable; a content that begins with -> is a symlink.
type memory map[string]string

func (m memory) Lookup(name string) (File, bool) {
	name = path.Clean("/" + name)[1:]
	for range 8 {
		data, ok := m[name]
		if !ok {
			return File{}, false
		}
		if to, ok := strings.CutPrefix(data, "-> "); ok {
			name = to
			continue
		}
		return File{name, true, strings.Contains(name, "bin/"), int64(len(data))}, true
	}
	return File{}, false
}

func (m memory) List(dir string) (names []string) {
	dir = path.Clean("/" + dir)[1:]
	for name := range m {
		if rest, ok := strings.CutPrefix("/"+name, strings.TrimSuffix("/"+dir, "/")+"/"); ok {
			first, _, _ := strings.Cut(rest, "/")
			names = append(names, first)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (m memory) ReadAt(_ context.Context, f File, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > f.Size {
		return errors.New("out of the file")
	}
	copy(p, m[f.Name][off:])
	return nil
}

// program returns an ELF file of 64 bits with an interpreter, that needs libraries.
func program(interpreter string, needed []string, paths ...string) string {
	strtab := "\x00"
	add := func(s string) uint64 {
		at := len(strtab)
		strtab += s + "\x00"
		return uint64(at)
	}
	var dyn []elf.Dyn64
	for _, n := range needed {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: add(n)})
	}
	for _, p := range paths {
		tag := elf.DT_RUNPATH
		if s, ok := strings.CutPrefix(p, "rpath:"); ok {
			tag, p = elf.DT_RPATH, s
		}
		dyn = append(dyn, elf.Dyn64{Tag: int64(tag), Val: add(p)})
	}
	const base, vaddr = 64 + 3*56, 0x400000
	dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_STRTAB)}, elf.Dyn64{})
	strAt := base + uint64(len(dyn))*16
	dyn[len(dyn)-2].Val = vaddr + strAt
	interpAt := strAt + uint64(len(strtab))
	end := interpAt + uint64(len(interpreter)) + 1
	h := elf.Header64{Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: 3, Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Phentsize: 56, Phnum: 3}
	progs := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Vaddr: vaddr, Filesz: end, Memsz: end},
		{Type: uint32(elf.PT_DYNAMIC), Off: base, Vaddr: vaddr + base, Filesz: uint64(len(dyn)) * 16},
		{Type: uint32(elf.PT_INTERP), Off: interpAt, Filesz: uint64(len(interpreter)) + 1},
	}
	if interpreter == "" {
		progs[2].Type = uint32(elf.PT_NOTE)
	}
	var b bytes.Buffer
	for _, v := range []any{h, progs, dyn} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.WriteString(strtab + interpreter + "\x00")
	return b.String()
}

func names(p *profile.Profile) (list []string) {
	for _, x := range p.Pieces {
		if !slices.Contains(list, x.Path) {
			list = append(list, x.Path)
		}
	}
	return list
}

func TestOf(t *testing.T) {
	const ld = "/lib64/ld-linux-x86-64.so.2"
	lib := func(needed ...string) string { return program("", needed) }
	image := memory{
		"etc/passwd": "root", "etc/group": "root", "etc/nsswitch.conf": "hosts", "etc/ld.so.cache": "cache",
		"lib64/ld-linux-x86-64.so.2": lib(), "lib/x86_64-linux-gnu/libc.so.6": lib(), "usr/lib/libm.so.6": lib("libc.so.6"),
		"etc/ld.so.conf": "# all\ninclude ld.so.conf.d/*.conf\n", "etc/ld.so.conf.d/a.conf": "/opt/a\n", "etc/ld.so.conf.d/b": "/opt/b\n",
		"opt/a/liba.so": lib("libm.so.6"), "opt/b/libb.so": lib(),
		"opt/other/liba.so": strings.Replace(lib(), "\x3e\x00", "\xb7\x00", 1), // of another machine
		"app/lib/libown.so": lib("liba.so", "libown.so"),
		"app/bin/app":       program(ld, []string{"libown.so", "libc.so.6", "libgone.so"}, "$ORIGIN/../lib"),
		"app/bin/old":       program(ld, []string{"libown.so"}, "rpath:${ORIGIN}/../lib"),
		"usr/bin/app":       "-> app/bin/app", "app/data": "data",
		"usr/bin/env": program(ld, []string{"libc.so.6"}), "bin/sh": program(ld, []string{"libc.so.6"}), "bin/static": lib(),
		"app/run.sh":      "#!/bin/sh -e\nset -e\nexec \"$@\"\n",
		"app/run.py":      "#!/usr/bin/env -S python3 -u\nprint()\n",
		"app/loop":        "#!/app/loop\n",
		"usr/bin/tini":    program(ld, []string{"libc.so.6"}),
		"usr/bin/python3": "-> usr/bin/python3.12", "usr/bin/python3.12": program(ld, []string{"libc.so.6"}),
		"usr/lib/python3.12/os.py": "os", "usr/lib/python3.12/encodings/__init__.py": "import codecs", "usr/lib/python3.12/encodings/utf_8.py": "utf8",
		"usr/lib/python3.12/encodings/__pycache__/utf_8.cpython-312.pyc": "utf8", "usr/lib/python3.12/codecs.py": "import types", "usr/lib/python3.12/types.py": "types",
		"usr/lib/python3/dist-packages/mod/__init__.py": "", "usr/lib/python3/dist-packages/mod/__main__.py": "main",
		"app/site.py": "none", "big": strings.Repeat("b", maxWhole+100),
	}
	who := []string{"etc/passwd", "etc/group"}
	glibc := []string{"lib64/ld-linux-x86-64.so.2", "etc/ld.so.cache"}
	libc, own := "lib/x86_64-linux-gnu/libc.so.6", []string{"app/lib/libown.so", "lib/x86_64-linux-gnu/libc.so.6", "opt/a/liba.so", "usr/lib/libm.so.6"}
	app := slices.Concat(who, []string{"app/bin/app"}, glibc, own, []string{"etc/nsswitch.conf"})
	sh := slices.Concat(who, []string{"bin/sh"}, glibc, []string{libc, "etc/nsswitch.conf"})
	tail := []string{"app/bin/app", "app/lib/libown.so", "opt/a/liba.so", "usr/lib/libm.so.6"} // what the app needs beside a shell
	for _, test := range []struct {
		name string
		c    Command
		want []string
	}{
		{"by PATH, through a symlink", Command{Args: []string{"app"}}, app},
		{"by path, with a file", Command{Args: []string{"bin/app", "data", "-x", "gone"}, Dir: "/app"}, append(slices.Clip(app), "app/data")},
		{"rpath", Command{Args: []string{"/app/bin/old"}}, slices.Concat(who, []string{"app/bin/old"}, glibc,
			[]string{"app/lib/libown.so", "opt/a/liba.so", "usr/lib/libm.so.6", libc, "etc/nsswitch.conf"})},
		{"LD_LIBRARY_PATH with a library of another machine", Command{Args: []string{"app"}, Env: []string{"LD_LIBRARY_PATH=/opt/other"}}, app},
		{"LD_PRELOAD", Command{Args: []string{"sh"}, Env: []string{"LD_PRELOAD=/opt/b/libb.so"}}, slices.Concat(who, []string{"bin/sh"}, glibc, []string{"opt/b/libb.so", libc, "etc/nsswitch.conf"})},
		{"another PATH", Command{Args: []string{"app"}, Env: []string{"PATH=/bin"}}, nil},
		{"static", Command{Args: []string{"static"}}, append(slices.Clip(who), "bin/static", "etc/nsswitch.conf")},
		{"shell", Command{Args: []string{"/bin/sh", "-c", "exec app --flag"}}, slices.Concat(sh, tail)},
		{"shell with what it has to expand", Command{Args: []string{"/bin/sh", "-c", "$APP"}}, sh},
		{"entrypoint script", Command{Args: []string{"/app/run.sh", "app"}}, slices.Concat(who, []string{"app/run.sh"}, sh[2:], tail)},
		{"env", Command{Args: []string{"env", "A=b", "-i", "app"}}, slices.Concat(who, []string{"usr/bin/env"}, glibc, []string{libc, "etc/nsswitch.conf"}, tail)},
		{"init", Command{Args: []string{"tini", "-g", "--", "app"}}, slices.Concat(who, []string{"usr/bin/tini"}, glibc, []string{libc, "etc/nsswitch.conf"}, tail)},
		{"python script", Command{Args: []string{"/app/run.py"}}, slices.Concat(who, []string{"app/run.py", "usr/bin/env"}, glibc, []string{libc, "etc/nsswitch.conf",
			"usr/bin/python3.12", "usr/lib/python3.12/encodings/__init__.py", "usr/lib/python3.12/types.py", "usr/lib/python3.12/encodings/__pycache__/utf_8.cpython-312.pyc"})},
		{"python module", Command{Args: []string{"python3", "-m", "mod"}}, slices.Concat(who, []string{"usr/bin/python3.12"}, glibc, []string{libc, "etc/nsswitch.conf",
			"usr/lib/python3.12/encodings/__init__.py", "usr/lib/python3.12/types.py", "usr/lib/python3.12/encodings/__pycache__/utf_8.cpython-312.pyc",
			"usr/lib/python3/dist-packages/mod/__main__.py"})},
		{"a script that is its own interpreter", Command{Args: []string{"/app/loop"}}, append(slices.Clip(who), "app/loop")},
		{"nothing", Command{}, nil},
		{"a directory", Command{Args: []string{"/app"}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := Of(t.Context(), image, test.c)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, names(p)); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
	p, _ := Of(t.Context(), image, Command{Args: []string{"static", "/big"}})
	var pieces []int
	for _, x := range p.Pieces {
		if x.Path == "big" {
			pieces = append(pieces, x.Index)
		}
	}
	if len(pieces) != head/profile.PieceSize+2 || pieces[len(pieces)-1] != maxWhole/profile.PieceSize {
		t.Errorf("pieces of a large file: %v", pieces)
	}
}

// TestSegments: of a large ELF file the segments that are mapped are taken, and of a large segment the beginning, or what the loader's tables need.
func TestSegments(t *testing.T) {
	const mib = 1 << 20
	const maxSegment = 4 * mib // see elf.File.Parts
	file := func(relocations uint64) string {
		const vaddr, size = 0x400000, 24 * mib
		dynamic := []elf.Dyn64{{Tag: int64(elf.DT_RELA), Val: vaddr + 1000}, {Tag: int64(elf.DT_RELASZ), Val: relocations}, {}}
		progs := []elf.Prog64{
			{Type: uint32(elf.PT_LOAD), Vaddr: vaddr, Off: 0, Filesz: 6 * mib},
			{Type: uint32(elf.PT_LOAD), Vaddr: vaddr + 8*mib, Off: 8 * mib, Filesz: maxSegment},
			{Type: uint32(elf.PT_LOAD), Vaddr: vaddr + 13*mib, Off: 13 * mib, Filesz: maxSegment + 1},
			{Type: uint32(elf.PT_DYNAMIC), Off: 17 * mib, Vaddr: vaddr + 17*mib, Filesz: 48},
		}
		var b bytes.Buffer
		h := elf.Header64{Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: 3, Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Phentsize: 56, Phnum: uint16(len(progs))}
		for _, v := range []any{h, progs} {
			binary.Write(&b, binary.LittleEndian, v)
		}
		b.Write(make([]byte, 17*mib-b.Len()))
		binary.Write(&b, binary.LittleEndian, dynamic)
		b.Write(make([]byte, size-b.Len()))
		return b.String()
	}
	for _, test := range []struct {
		relocations uint64
		first       int64 // bytes of the first segment
	}{{0, head}, {3 * mib, 1000 + 3*mib}, {6 * mib, head}, {1<<64 - 1, head}} {
		want := map[int]bool{}
		for _, part := range [][2]int64{{0, test.first}, {8 * mib, maxSegment}, {13 * mib, head}, {17 * mib, 1}} {
			for at := part[0]; at < part[0]+part[1]; at += profile.PieceSize {
				want[int(at/profile.PieceSize)] = true
			}
		}
		p, err := Of(t.Context(), memory{"bin/app": file(test.relocations)}, Command{Args: []string{"app"}})
		if err != nil {
			t.Fatal(err)
		}
		got := map[int]bool{}
		for _, x := range p.Pieces {
			got[x.Index] = true
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("relocations of %d bytes: pieces (-want +got):\n%s", test.relocations, diff)
		}
	}
}

// machine is this machine's own tree.
type machine struct{}

func (machine) Lookup(name string) (File, bool) {
	real, err := filepath.EvalSymlinks("/" + name)
	if err != nil {
		return File{}, false
	}
	st, err := os.Stat(real)
	if err != nil {
		return File{}, false
	}
	return File{strings.TrimPrefix(real, "/"), st.Mode().IsRegular(), st.Mode()&0o111 != 0, st.Size()}, true
}

func (machine) List(name string) (names []string) {
	entries, _ := os.ReadDir("/" + name)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (machine) ReadAt(_ context.Context, f File, p []byte, off int64) error {
	in, err := os.Open("/" + f.Name)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = in.ReadAt(p, off)
	return err
}

// TestLoader shows that the libraries of real programs are those that the loader of this machine opens.
func TestLoader(t *testing.T) {
	tried := 0
	for _, program := range []string{"ls", "git", "python3", "bash", "curl", "tar"} {
		file, err := exec.LookPath(program)
		if err != nil {
			continue
		}
		out, err := exec.Command("ldd", file).Output()
		if err != nil {
			continue // static, or there is no ldd
		}
		tried++
		p, err := Of(t.Context(), machine{}, Command{Args: []string{file}})
		if err != nil {
			t.Fatal(err)
		}
		have := names(p)
		for line := range strings.Lines(string(out)) {
			for _, word := range strings.Fields(line) {
				real, err := filepath.EvalSymlinks(word)
				if path.IsAbs(word) && err == nil && !slices.Contains(have, real[1:]) {
					t.Errorf("%s: %s is not in %q", program, word, have)
				}
			}
		}
	}
	if tried == 0 {
		t.Skip("no program here that ldd says something about")
	}
}

// FuzzOf: no panic, no read out of a file, and no more than what is bounded, whatever a program is.
func FuzzOf(f *testing.F) {
	f.Add([]byte(program("/lib/ld.so", []string{"liba.so", "x", "/y"}, "$ORIGIN:$LIB", "rpath:/lib")), "include *\n/lib\n", "x")
	f.Add([]byte("#!/usr/bin/env -S app app\nexec \"$@\""), "include ../etc/*", "-c exec app")
	f.Add([]byte("\x7fELF\x01\x02"+strings.Repeat("\xff", 80)), "", "")
	f.Add([]byte("\x00a.b\x00x\x00"), "import sys\nfrom .x import (y)\nlib.so\nimport x, app, a.b.c; __import__('x')", "-cimport a, x")
	f.Fuzz(func(t *testing.T, app []byte, conf, arg string) {
		image := memory{"bin/app": string(app), "lib/liba.so": string(app), "lib/ld.so": string(app), "etc/ld.so.conf": conf, "etc/x.conf": conf, "bin/sh": string(app)}
		image["usr/bin/env"], image["usr/bin/python3.12"], image["usr/lib/python3.12/os.py"] = string(app), string(app), conf
		image["app"], image["a/__init__.py"], image["a/b.so"], image["x.py"], image["usr/lib/python3/dist-packages/x.pth"], image["usr/bin/pyvenv.cfg"] = string(app), conf, string(app), string(app), conf, conf
		for _, args := range [][]string{{"app", arg}, {"sh", "-c", arg}, {"env", arg}, {"python3.12", "-m", arg}, {"python3.12", arg}, {"python3.12", "app"}, {arg}} {
			p, err := Of(t.Context(), image, Command{Args: args})
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range p.Pieces {
				if size := int64(len(image[x.Path])); int64(x.Index)*profile.PieceSize >= size {
					t.Fatalf("piece %d of %s, which has %d bytes", x.Index, x.Path, size)
				}
			}
		}
	})
}
