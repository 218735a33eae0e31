package integration

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// imports is the table of docs/design.md: the packages of this module that each package may import.
// "all" allows every one. A package that has no line is looked up by the folders above it.
var imports = map[string][]string{
	"cmd/lazuli":  {"all"},
	"snapshotter": {"fs"},
	"convert":     {"fs/toc", "fs/remote", "fs/pack", "fs/profile", "fs/meta", "fs/elf"},
	"fs/rootfs":   {"fs/serve", "fs/fetch", "fs/store", "fs/meta", "fs/toc", "fs/remote", "fs/pack", "fs/profile", "fs/elf"},
	"fs/serve":    {"fs/meta", "fs/fetch", "fs/store"},
	"fs/fetch":    {"fs/remote", "fs/store", "fs/toc", "fs/pack"},
	"fs/pack":     {"fs/toc"},
	"fs/profile":  {"fs/toc"},
	"fs/elf":      {},
	"fs/store":    {},
	"fs/meta":     {"fs/toc"},
	"fs/toc":      {},
	"fs/remote":   {},
	"fs/bundle":   {},
	"fs/upper":    {"fs/store", "fs/toc"},
	"integration": {"all"},
}

// estargz makes layers for the tests of any package.
const estargz = "github.com/containerd/stargz-snapshotter/estargz"

// fences says which folders may import a module that brings much with it. Only these.
var fences = map[string][]string{
	"github.com/hanwen/go-fuse": {"fs/serve"},
	estargz:                     {"fs/toc", "convert", "integration"},
	"github.com/containerd/":    {"snapshotter", "cmd"},
	"google.golang.org/grpc":    {"snapshotter", "cmd"},
}

// TestImports holds every package of the module against the table and the fences. A test file may import what
// it likes, but not what is fenced off.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "lazuli/...").Output()
	must(t, err)
	seen := map[string]bool{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if folder := folderOf(p.ImportPath); folder != "" {
			seen[folder] = true
		}
		for _, fault := range p.faults() {
			t.Error(fault)
		}
	}
	for _, folder := range []string{"fs/toc", "convert", "integration"} {
		if !seen[folder] {
			t.Errorf("go list does not list %s", folder)
		}
	}
}

type listed struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

// folderOf returns the line of the table that holds for a package, "" if there is none.
func folderOf(path string) string {
	folder := strings.TrimPrefix(path, "lazuli/")
	for {
		if _, ok := imports[folder]; ok {
			return folder
		}
		i := strings.LastIndexByte(folder, '/')
		if i < 0 {
			return ""
		}
		folder = folder[:i]
	}
}

func (p listed) faults() (list []string) {
	folder := folderOf(p.ImportPath)
	if folder == "" {
		return []string{p.ImportPath + " is not in the table of packages"}
	}
	allowed := imports[folder]
	for _, i := range p.Imports {
		own, ok := strings.CutPrefix(i, "lazuli/")
		if ok && !slices.Contains(allowed, "all") && folderOf(i) != folder && !slices.ContainsFunc(allowed, func(a string) bool { return below(own, a) }) {
			list = append(list, p.ImportPath+" imports "+i+", the table allows "+strings.Join(allowed, ", "))
		}
	}
	for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
		fence := ""
		for f := range fences {
			if strings.HasPrefix(i, f) && len(f) > len(fence) { // the longest, which says most
				fence = f
			}
		}
		if fence == estargz && !slices.Contains(p.Imports, i) {
			continue
		}
		if fence != "" && !slices.ContainsFunc(fences[fence], func(a string) bool { return below(folder, a) }) {
			list = append(list, p.ImportPath+" imports "+i+", which only "+strings.Join(fences[fence], ", ")+" may")
		}
	}
	return list
}

// below reports whether path is folder or lies in it.
func below(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

// TestImportFaults shows that the table can be offended.
func TestImportFaults(t *testing.T) {
	for _, test := range []struct {
		p    listed
		want int
	}{
		{listed{"lazuli/fs/store", []string{"os", "golang.org/x/sys/unix"}, nil, nil}, 0},
		{listed{"lazuli/fs/store", []string{"lazuli/fs/toc"}, nil, nil}, 1},
		{listed{"lazuli/fs/store", nil, []string{"lazuli/fs/toc"}, nil}, 0},
		{listed{"lazuli/fs/meta", []string{"lazuli/fs/toc", "lazuli/fs/meta/internal/x"}, nil, nil}, 0},
		{listed{"lazuli/fs/meta/internal/x", []string{"lazuli/fs/store"}, nil, nil}, 1},
		{listed{"lazuli/snapshotter", []string{"lazuli/fs/rootfs", "github.com/containerd/containerd/v2/core/snapshots"}, nil, nil}, 0},
		{listed{"lazuli/snapshotter", []string{"lazuli/convert"}, nil, nil}, 1},
		{listed{"lazuli/fs/rootfs", []string{"github.com/hanwen/go-fuse/v2/fuse"}, nil, nil}, 1},
		{listed{"lazuli/fs/rootfs", nil, nil, []string{"github.com/hanwen/go-fuse/v2/fuse"}}, 1},
		{listed{"lazuli/fs/serve", []string{"github.com/hanwen/go-fuse/v2/fuse"}, nil, nil}, 0},
		{listed{"lazuli/convert", []string{"github.com/containerd/stargz-snapshotter/estargz"}, nil, nil}, 0},
		{listed{"lazuli/fs/fetch", nil, []string{"github.com/containerd/stargz-snapshotter/estargz"}, nil}, 0},
		{listed{"lazuli/cmd/lazuli", []string{"github.com/containerd/stargz-snapshotter/estargz"}, nil, nil}, 1},
		{listed{"lazuli/integration/worst", []string{"github.com/containerd/containerd/v2/client"}, nil, nil}, 1},
		{listed{"lazuli/new", nil, nil, nil}, 1},
		{listed{"lazuli/fs/new", nil, nil, nil}, 1},
	} {
		if got := test.p.faults(); len(got) != test.want {
			t.Errorf("%+v: faults %q, want %d", test.p, got, test.want)
		}
	}
}
