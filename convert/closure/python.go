package closure

import (
	"bytes"
	"iter"
	"path"
	"slices"
	"strconv"
	"strings"
)

// startModules are what Python 3 imports at each start, whatever it runs (python3 -v), siteModules what it imports last of that,
// bootModules those that it has in itself, so that it does not read their files, and frozenModules those that it has too since 3.11.
var (
	startModules  = []string{"encodings", "codecs", "encodings.aliases", "encodings.utf_8", "io", "abc", "site"}
	siteModules   = []string{"sitecustomize", "usercustomize"}
	bootModules   = []string{"importlib._bootstrap", "importlib._bootstrap_external"}
	frozenModules = []string{"codecs", "io", "abc", "site", "os", "stat", "_collections_abc", "posixpath", "ntpath", "genericpath", "_sitebuiltins", "zipimport",
		"runpy", "importlib.util", "importlib.machinery"}
)

const (
	maxModules = 1 << 13
	maxAll     = 1 << 17   // names that modules import, of all of them together
	maxListed  = 1 << 20   // names in folders
	maxFolders = 128       // of the search path, and of a package
	maxSource  = 2 << 20   // bytes of a source that is looked at
	maxSources = 192 << 20 // bytes of all of them, and of extension modules
)

// A module is what an import brings.
type module struct {
	file    File     // what Python reads of it: the compiled file if there is one, else the source; without a name if that is nothing
	library bool     // file is an ELF file
	source  File     // what is looked at for its imports
	text    string   // the same, if that is no file
	dirs    []string // where modules below it are, if it is a package
	pkg     string   // where its relative imports begin
	main    bool

	imports []string // names from the root, in order
	found   bool     // by discover
	loaded  bool
}

// A python is an interpreter that imports modules.
type python struct {
	w       *walk
	tag     string   // of compiled files, such as cpython-311
	path    []string // sys.path
	frozen  []string
	modules map[string]*module          // by name, nil if there is none
	folders map[string]map[string]entry // by path and module

	count, names, listed int   // of modules, of names that they import, of names in folders
	sources              int64 // bytes
}

// An entry says what a folder has for a module.
type entry struct {
	library  string // the file of an extension module
	source   bool
	compiled bool // where the source would be
	folder   bool // or something else without a suffix
}

// python adds what a Python reads: called is the path by which it was, f the file.
func (w *walk) python(called string, f File, args []string) {
	w.named("usr/lib/locale/C.utf8/LC_CTYPE") // what Python makes of the C locale, PEP 538
	w.named("etc/localtime")
	if l := w.loader; l != nil {
		w.named(path.Join("usr/lib", l.main.Triplet(), "gconv/gconv-modules.cache"))
	}
	// A virtual environment says so beside its bin folder or in it (PEP 405).
	prefix, home, system := path.Dir(path.Dir(called)), path.Dir("/"+f.Name), true
	venv, ok := w.named(path.Join(prefix, "pyvenv.cfg"))
	if !ok {
		venv, ok = w.named(path.Join(path.Dir(called), "pyvenv.cfg"))
	}
	if ok {
		system = false
		for line := range strings.Lines(string(w.read(venv, 0, maxText))) {
			key, value, _ := strings.Cut(line, "=")
			switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
			case "home":
				home = w.abs(value)
			case "include-system-site-packages":
				system = strings.EqualFold(value, "true")
			}
		}
	}
	// The library lies beside the interpreter's folder: lib/python3.X/os.py is how Python itself finds it.
	version := strings.TrimPrefix(path.Base(f.Name), "python")
	lib := ""
	for _, dir := range []string{path.Dir(path.Dir("/" + f.Name)), path.Dir(home)} {
		for _, name := range []string{"lib", "lib64"} {
			try := path.Join(dir, name, "python"+version)
			if _, ok := w.lookup(try + "/os.py"); ok && lib == "" {
				lib = try
			}
		}
	}
	if lib == "" {
		return
	}
	p := &python{w: w, tag: "cpython-" + strings.ReplaceAll(version, ".", ""), frozen: bootModules,
		modules: map[string]*module{}, folders: map[string]map[string]entry{}}
	if minor, err := strconv.Atoi(strings.TrimPrefix(version, "3.")); err == nil && minor >= 11 {
		p.frozen = slices.Concat(bootModules, frozenModules)
	}

	main, name := p.program(args)
	for dir := range strings.SplitSeq(w.env("PYTHONPATH"), ":") {
		if dir != "" {
			p.look(w.abs(dir))
		}
	}
	p.look(lib)
	p.look(lib + "/lib-dynload")
	start := &module{text: "import " + strings.Join(startModules, ",") + "\n"}
	if ok {
		p.site(prefix, version, start)
	}
	if system {
		if !ok {
			user := w.env("HOME")
			if user == "" {
				user = "/root"
			}
			p.site(path.Join(w.abs(user), ".local"), version, start)
		}
		p.site(path.Dir(path.Dir(lib)), version, start)
	}
	for _, dir := range w.ros() {
		p.look(dir + "/lib/python3/dist-packages")
		p.look(dir + "/lib/python" + version + "/site-packages")
	}
	start.text += "import " + strings.Join(siteModules, ",") + "\n"

	order := []*module{start}
	if name != "" {
		parent, _ := parentOf(name)
		if m := p.find(name); m != nil && m.dirs != nil {
			parent, name = name, name+".__main__"
		}
		before := &module{text: "import runpy\n"}
		if parent != "" {
			before.text += "import " + parent + "\n"
		}
		order = append(order, before)
		if m := p.find(name); m != nil {
			x := *m
			main = &x
			main.main, main.pkg = true, parent
		}
	}
	if main != nil {
		order = append(order, main)
	}
	p.discover(order)
	for _, m := range order {
		p.load(m)
	}
}

// program returns what the arguments of a Python have it run, or the name of a module, and begins the search path with its folder.
func (p *python) program(args []string) (main *module, name string) {
	for i := 0; i < len(args); i++ {
		a := args[i]
		if a == "-" {
			break
		}
		if a == "" || a[0] != '-' {
			file, ok := p.w.lookup(p.w.abs(a))
			if !ok { // a folder, perhaps
				file, ok = p.w.lookup(path.Join(p.w.abs(a), "__main__.py"))
			}
			if !ok {
				break
			}
			p.look(path.Dir("/" + file.Name)) // symlinks followed, as Python does
			return &module{file: file, source: file, main: true}, ""
		}
		if strings.HasPrefix(a, "--") {
			continue
		}
		at := strings.IndexAny(a, "mcWX")
		if at < 0 {
			continue
		}
		value := a[at+1:]
		if value == "" {
			if i++; i == len(args) {
				break
			}
			value = args[i]
		}
		if a[at] == 'm' || a[at] == 'c' {
			p.look(path.Join("/", p.w.c.Dir))
			if a[at] == 'm' {
				return nil, value
			}
			return &module{text: value, main: true}, ""
		}
	}
	return nil, ""
}

// look adds a folder to the search path, if there is something in it.
func (p *python) look(dir string) {
	if len(p.path) < maxFolders && !slices.Contains(p.path, dir) && len(p.list(dir)) > 0 {
		p.path = append(p.path, dir)
	}
}

// site adds the folders for packages below a prefix to the search path, and what their .pth files say: folders, and statements, which
// become start's.
func (p *python) site(prefix, version string, start *module) {
	dirs := []string{"lib/python" + version + "/site-packages", "lib64/python" + version + "/site-packages"}
	if prefix == "/usr" { // Debian
		dirs = append(dirs, "local/lib/python"+version+"/dist-packages", "lib/python3/dist-packages", "lib/python"+version+"/dist-packages")
	}
	for _, dir := range dirs {
		dir = path.Join(prefix, dir)
		p.look(dir)
		files := 0
		for _, name := range p.w.files.List(dir) {
			if !strings.HasSuffix(name, ".pth") || strings.HasPrefix(name, ".") {
				continue
			}
			if files++; files > maxFolders {
				break
			}
			f, ok := p.w.named(path.Join(dir, name))
			if !ok {
				continue
			}
			for line := range strings.Lines(string(p.w.read(f, 0, maxText))) {
				switch line = strings.TrimSpace(line); {
				case line == "" || line[0] == '#':
				case strings.HasPrefix(line, "import ") || strings.HasPrefix(line, "import\t"):
					start.text += line + "\n"
				case path.IsAbs(line):
					p.look(path.Clean(line))
				default:
					p.look(path.Join(dir, line))
				}
			}
		}
	}
}

// list returns what a folder has, by module.
func (p *python) list(dir string) map[string]entry {
	have, ok := p.folders[dir]
	if ok || p.listed >= maxListed {
		return have
	}
	names := p.w.files.List(dir)
	if p.listed += len(names) + 1; p.listed > maxListed {
		return nil
	}
	if len(names) > 0 {
		have = map[string]entry{}
	}
	for _, name := range names {
		module, suffix, _ := strings.Cut(name, ".")
		e := have[module]
		switch {
		case suffix == "":
			e.folder = true
		case suffix == "py":
			e.source = true
		case suffix == "pyc":
			e.compiled = true
		default:
			if r := p.rank(suffix); r > 0 && r > p.rank(e.library) {
				e.library = suffix
			}
		}
		have[module] = e
	}
	p.folders[dir] = have
	return have
}

// rank says which of the files of an extension module Python prefers, by their suffixes; 0 is none.
func (p *python) rank(suffix string) int {
	switch {
	case suffix == "so":
		return 1
	case suffix == "abi3.so":
		return 2
	case strings.HasPrefix(suffix, p.tag+"-") && strings.HasSuffix(suffix, ".so"):
		return 3
	}
	return 0
}

// find returns the module of a name, or nil.
func (p *python) find(name string) *module {
	m, ok := p.modules[name]
	if ok || len(name) > maxName || p.count >= maxModules {
		return m
	}
	parent, last := parentOf(name)
	dirs := p.path
	if parent != "" {
		dirs = nil
		if above := p.find(parent); above != nil {
			dirs = above.dirs
		}
	}
	var places []string // of a package that is only folders
	for _, dir := range dirs {
		e, ok := p.list(dir)[last]
		if !ok {
			continue
		}
		below := path.Join(dir, last)
		var inside map[string]entry
		if e.folder {
			inside = p.list(below)
		}
		if m = p.module(name, below, "__init__", inside["__init__"]); m != nil {
			m.dirs, m.pkg = []string{below}, name
			break
		}
		if m = p.module(name, dir, last, e); m != nil {
			m.pkg = parent
			break
		}
		if inside != nil && len(places) < maxFolders {
			places = append(places, below)
		}
	}
	if m == nil && places != nil {
		m = &module{dirs: places, pkg: name}
	}
	if m != nil {
		p.count++
	}
	p.modules[name] = m
	return m
}

// module returns what a folder has for a module, or nil.
func (p *python) module(name, dir, last string, e entry) *module {
	m := new(module)
	var ok bool
	at := path.Join(dir, last)
	switch {
	case e.library != "":
		m.file, ok = p.w.lookup(at + "." + e.library)
		m.library = true
		m.source = m.file
	case e.source:
		m.source, ok = p.w.lookup(at + ".py")
		if compiled, ok := p.w.lookup(path.Join(dir, "__pycache__", last+"."+p.tag+".pyc")); ok {
			m.file = compiled
		} else {
			m.file = m.source
		}
		if slices.Contains(p.frozen, name) {
			m.file = File{}
		}
	case e.compiled:
		m.file, ok = p.w.lookup(at + ".pyc")
	}
	if !ok {
		return nil
	}
	return m
}

func parentOf(name string) (parent, last string) {
	dot := strings.LastIndexByte(name, '.')
	return name[:max(dot, 0)], name[dot+1:]
}

// discover finds what modules import, and what those import. Sources are read side by side.
func (p *python) discover(wave []*module) {
	var libraries []File
	for len(wave) > 0 && p.names < maxAll {
		batch := wave[:min(len(wave), 4*readers)] // so that not many names are in memory before they are counted
		wave = wave[len(batch):]
		names := make([][]string, len(batch))
		p.w.sideBySide(len(batch), func(r *reader, i int) {
			m := batch[i]
			switch {
			case m.source.Name == "":
				names[i] = imports([]byte(m.text), m.main)
			case m.library:
				names[i] = r.names(m.source)
			default:
				names[i] = imports(r.read(m.source, 0, maxSource), m.main)
			}
		})
		for i, m := range batch {
			if m.library {
				libraries = append(libraries, m.file)
			}
			for _, name := range names[i] {
				if name = absolute(name, m.pkg); name == "" || p.names >= maxAll {
					continue
				}
				p.names++
				m.imports = append(m.imports, name)
				for x := range p.along(name) {
					if x.found {
						continue
					}
					x.found = true
					if p.sources += x.source.Size; p.sources > maxSources {
						x.source = File{}
					}
					wave = append(wave, x)
				}
			}
		}
	}
	if p.w.loader != nil {
		p.w.loader.ahead(libraries, nil)
	}
}

// along yields the packages that lead to a module, and the module, as far as they are there.
func (p *python) along(name string) iter.Seq[*module] {
	return func(yield func(*module) bool) {
		for at := 0; at < len(name); at++ {
			if n := strings.IndexByte(name[at:], '.'); n >= 0 {
				at += n
			} else {
				at = len(name)
			}
			if m := p.find(name[:at]); m == nil || !yield(m) {
				return
			}
		}
	}
}

// absolute returns a name from the root; "" if there is none.
func absolute(name, pkg string) string {
	rest := strings.TrimLeft(name, ".")
	up := len(name) - len(rest)
	if up == 0 {
		return name
	}
	for ; up > 1; up-- {
		pkg, _ = parentOf(pkg)
	}
	if pkg == "" || rest == "" {
		return pkg
	}
	return pkg + "." + rest
}

// load adds a module and, as they are wanted, those that it imports.
func (p *python) load(m *module) {
	if m.loaded {
		return
	}
	m.loaded = true
	switch {
	case m.library && p.w.loader != nil:
		p.w.loader.load(m.file)
	case m.file.Name != "":
		p.w.whole(m.file)
	}
	for _, name := range m.imports {
		for x := range p.along(name) {
			p.load(x)
		}
	}
}

// names returns the strings of an extension module that may name modules which it imports: import statements that were compiled to C leave no other
// trace. A name without a dot counts if it is one of the same package.
func (r *reader) names(f File) (names []string) {
	const window, overlap = 1 << 20, 2 * maxName
	seen := map[string]bool{}
	for off := int64(0); off < min(f.Size, maxWhole) && len(names) < maxImports; off += window - overlap {
		parts := bytes.Split(r.read(f, off, window), []byte{0})
		for i := 1; i < len(parts)-1; i++ { // the first and the last may be parts of strings
			if !isModule(parts[i]) || len(names) >= maxImports {
				continue
			}
			name := string(parts[i])
			if !strings.Contains(name, ".") {
				name = "." + name
			}
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names
}

// isModule reports whether a module can have that name.
func isModule(name []byte) bool {
	if len(name) < 2 || len(name) > maxName {
		return false
	}
	begins := true // an element
	for _, c := range name {
		switch {
		case begins && (!isWord(c) || '0' <= c && c <= '9'), c >= 0x80, !isWord(c) && c != '.':
			return false
		}
		begins = c == '.'
	}
	return !begins
}
