package rootfs

import (
	"bytes"
	"hash/maphash"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"lazuli/fs/elf"
	"lazuli/fs/toc"
)

// A tree is what is known of an image's files while its start is followed: of those that programs find by name, where they are. Whiteouts are not
// looked at, and names are known by 64 bits of a hash: at worst something is fetched that nobody reads.
type tree struct {
	seed    maphash.Seed
	files   []treeFile
	paths   map[uint64]int32  // files, by their paths
	modules map[uint64]int32  // the files of Python's modules, by where they lie: usr/lib/python3/dist-packages/numpy/linalg
	stems   map[uint64]bool   // the last elements of those
	objects map[uint64]int32  // a file of each content, by packNumber
	links   map[string]string // symlinks
	sonames map[string]string // where a library is, by its name
	roots   []string          // folders that Python's modules are looked for in
}

type treeFile struct {
	name   string
	object uint64 // its content's packNumber
}

const (
	maxRoots = 16
	// The file that says where libraries are, read at each start of a program that needs some.
	loaderCache = "etc/ld.so.cache"
)

// followable reports whether an entry is a file that a start may be followed into, or name.
func followable(e *toc.Entry) bool {
	return e.Type == toc.Regular && e.Size > 0 && (e.Mode&0o111 != 0 || isLibrary(e.Name) || isPython(e.Name) || e.Name == loaderCache)
}

func isLibrary(name string) bool { return strings.Contains(path.Base(name), ".so") }
func isPython(name string) bool {
	return strings.HasSuffix(name, ".py") || strings.HasSuffix(name, ".pyc")
}

func newTree(tocs []*toc.TOC) *tree {
	t := &tree{
		seed: maphash.MakeSeed(), paths: map[uint64]int32{}, modules: map[uint64]int32{}, stems: map[uint64]bool{}, objects: map[uint64]int32{}, links: map[string]string{},
		sonames: map[string]string{},
	}
	for _, l := range tocs { // what is above, and what comes later, wins
		for i := range l.Entries {
			t.add(l, &l.Entries[i])
		}
	}
	return t
}

func (t *tree) add(l *toc.TOC, e *toc.Entry) {
	at := t.hash(e.Name)
	if e.Type != toc.Directory {
		delete(t.paths, at)
	}
	delete(t.links, e.Name)
	switch {
	case e.Type == toc.Symlink:
		name := strings.Clone(e.Name)
		t.links[name] = strings.Clone(e.Link)
		if isLibrary(name) {
			t.sonames[path.Base(name)] = name
		}
	case e.Type == toc.Hardlink:
		if file, ok := t.paths[t.hash(e.Link)]; ok {
			t.paths[at] = file
		}
	case e.Type == toc.Directory:
		switch path.Base(e.Name) {
		case "site-packages", "dist-packages", "lib-dynload":
			t.root(strings.Clone(e.Name))
		}
	case followable(e):
		file := int32(len(t.files))
		f := treeFile{strings.Clone(e.Name), packNumber(toc.ObjectKey(l.Content(e)))}
		t.files = append(t.files, f)
		t.paths[at] = file
		t.objects[f.object] = file
		if isLibrary(f.name) {
			t.sonames[path.Base(f.name)] = f.name
		}
		if m, ok := moduleOf(f.name); ok {
			t.stems[t.hash(path.Base(m))] = true
			at := t.hash(m)
			if old, ok := t.modules[at]; !ok || !strings.HasSuffix(t.files[old].name, ".pyc") || strings.HasSuffix(f.name, ".pyc") {
				t.modules[at] = file // what was compiled is read, if it is there
			}
		}
	}
}

func (t *tree) hash(name string) uint64 { return maphash.String(t.seed, name) }

func (t *tree) root(dir string) {
	if len(t.roots) < maxRoots && !slices.Contains(t.roots, dir) {
		t.roots = append(t.roots, dir)
	}
}

// file returns the file at a path, symlinks followed within the image.
func (t *tree) file(name string) (int32, bool) {
	const maxLinks = 16
next:
	for range maxLinks {
		name = strings.TrimPrefix(path.Clean("/"+name), "/")
		for i := range len(name) + 1 {
			if i < len(name) && name[i] != '/' {
				continue
			}
			if to, ok := t.links[name[:i]]; ok {
				if !path.IsAbs(to) {
					to = path.Join("/", path.Dir(name[:i]), to)
				}
				name = to + name[i:]
				continue next
			}
		}
		file, ok := t.paths[t.hash(name)]
		return file, ok
	}
	return 0, false
}

// moduleOf returns where a Python module lies whose file has a name.
func moduleOf(name string) (string, bool) {
	if !isPython(name) && !strings.HasSuffix(name, ".so") {
		return "", false
	}
	dir := strings.TrimSuffix(path.Dir(name), "/__pycache__")
	stem, _, _ := strings.Cut(path.Base(name), ".")
	if stem == "__init__" {
		return dir, true
	}
	return path.Join(dir, stem), true
}

// A references finds out what files name. It may be used by several goroutines.
type references struct {
	lookups atomic.Int64

	mu    sync.Mutex
	roots []string // of the tree, and what was found since
}

// elf returns what a loader opens for an ELF file of size bytes, in its order, as far as the folders are known that it looks in, and else whatever
// has the library's name. read returns n bytes of the file at off, or none. parts are what the loader reads of the file itself.
func (r *references) elf(t *tree, at int32, size int64, read func(off, n int64) []byte) (named []int32, parts []elf.Part) {
	f := elf.Parse(size, read)
	if f == nil {
		return nil, nil
	}
	name := func(path string) bool {
		file, ok := t.file(path)
		if ok {
			named = append(named, file)
		}
		return ok
	}
	if f.Interpreter != "" {
		name(f.Interpreter)
		name(loaderCache)
	}
	dirs := append(elf.Origin(append(f.RunPath, f.RPath...), t.files[at].name), f.Folders()...)
needed:
	for _, lib := range f.Needed {
		if strings.Contains(lib, "/") {
			name(lib)
			continue
		}
		for _, dir := range dirs {
			if r.lookups.Add(1) > maxLookups || name(path.Join(dir, lib)) {
				continue needed
			}
		}
		if p, ok := t.sonames[lib]; ok {
			name(p)
		}
	}
	return named, f.Parts(size)
}

const (
	// maxModule is how large a Python file is looked into, in bytes: of 24,000 with NumPy and SciPy four are larger.
	maxModule = 1 << 20
	// maxNames is how many names of one are looked up, and maxPackages in how many packages.
	maxNames    = 2048
	maxPackages = 32
	// maxLookups bounds what one start may cost: about half a second of one processor.
	maxLookups = 1 << 22
)

// python returns the modules that a Python file may import: those that have one of the names in it, beside it, in the folders where modules are, or in
// a package that has another of its names. Which names are imported is not told from the others: of what has a module's name in a file that
// is imported most is.
func (r *references) python(t *tree, at int32, size int64, read func(off, n int64) []byte) (named []int32) {
	if size > maxModule {
		return nil
	}
	b := read(0, size)
	file := t.files[at].name
	names := slices.DeleteFunc(pythonNames(b, strings.HasSuffix(file, ".pyc")), func(name string) bool {
		first, _, _ := strings.Cut(name, ".")
		return !t.stems[t.hash(first)]
	})
	here, _ := moduleOf(file)
	if stem, _, _ := strings.Cut(path.Base(file), "."); stem != "__init__" {
		here = path.Dir(here)
	}
	seen := map[int32]bool{at: true}
	var packages []string
	module := func(name string) bool {
		file, ok := t.modules[t.hash(name)]
		if r.lookups.Add(1) > maxLookups || !ok {
			return false
		}
		if !seen[file] {
			seen[file] = true
			named = append(named, file)
			if m, _ := moduleOf(t.files[file].name); strings.HasPrefix(path.Base(t.files[file].name), "__init__.") && len(packages) < maxPackages {
				packages = append(packages, m)
			}
		}
		return true
	}
	dirs := append([]string{here}, r.rootsOf(t, here)...)
	for _, name := range names {
		for _, dir := range dirs {
			rest := name
			for p := dir; rest != ""; { // a package's own file is read before what is in it
				var part string
				part, rest, _ = strings.Cut(rest, ".")
				if p = p + "/" + part; part == "" || !module(p) {
					break
				}
			}
		}
	}
	for _, p := range packages {
		for _, name := range names {
			if !strings.Contains(name, ".") {
				module(p + "/" + name)
			}
		}
	}
	return named
}

// rootsOf returns the folders where modules are looked for: with the one that the package dir lies in, or what lies there beside it.
func (r *references) rootsOf(t *tree, dir string) []string {
	for dir != path.Dir(dir) {
		if _, ok := t.modules[t.hash(dir)]; !ok {
			break
		}
		dir = path.Dir(dir)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.roots == nil {
		r.roots = slices.Clone(t.roots)
	}
	if len(r.roots) < 2*maxRoots && !slices.Contains(r.roots, dir) {
		r.roots = append(slices.Clip(r.roots), dir)
	}
	return r.roots
}

// pythonNames returns the names in a Python file, each once: in one that was compiled, which holds them as short strings (type, length,
// bytes: Python/marshal.c), or else in the lines of the import statements.
func pythonNames(b []byte, compiled bool) (names []string) {
	seen := map[string]bool{}
	add := func(s []byte) {
		if len(names) < maxNames && !seen[string(s)] {
			seen[string(s)] = true
			names = append(names, string(s))
		}
	}
	if compiled {
		const shortASCII, shortInterned, flagRef = 'z', 'Z', 0x80
		for i := 0; i+2 < len(b); i++ {
			if c := b[i] &^ flagRef; c != shortASCII && c != shortInterned {
				continue
			}
			if n := int(b[i+1]); n > 0 && i+2+n <= len(b) && isName(b[i+2:i+2+n]) {
				add(b[i+2 : i+2+n])
				i += 1 + n
			}
		}
		return names
	}
	var open, more bool // a parenthesis, and a line that goes on
	for line := range bytes.Lines(b) {
		line = bytes.TrimSpace(line)
		if !open && !more && !bytes.HasPrefix(line, []byte("import ")) && !bytes.HasPrefix(line, []byte("from ")) {
			continue
		}
		line, _, _ = bytes.Cut(line, []byte("#"))
		open = (open || bytes.Contains(line, []byte("("))) && !bytes.Contains(line, []byte(")"))
		more = bytes.HasSuffix(line, []byte(`\`))
		for _, word := range bytes.FieldsFunc(line, func(r rune) bool { return r > 0x7f || r != '.' && !nameByte(byte(r)) }) {
			if word = bytes.Trim(word, "."); isName(word) {
				add(word)
			}
		}
	}
	return names
}

func nameByte(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
}

// isName reports whether s is identifiers with dots between them, or beside them.
func isName(s []byte) bool {
	for _, c := range s {
		if c != '.' && !nameByte(c) {
			return false
		}
	}
	return len(s) > 0
}
