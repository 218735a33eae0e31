package closure

import (
	"path"
	"slices"
	"strconv"
	"strings"
)

// startModules are what Python 3 imports from files at each start, whatever it runs (python3 -v), and frozenModules those that it has in
// itself since 3.11.
var (
	startModules  = []string{"encodings/__init__", "encodings/aliases", "encodings/utf_8", "sitecustomize", "usercustomize", "types", "warnings"}
	frozenModules = []string{"codecs", "io", "abc", "site", "os", "stat", "_collections_abc", "posixpath", "genericpath", "_sitebuiltins"}
)

// python adds what a Python reads before it runs anything: called is the path by which it was, f the file.
func (w *walk) python(called string, f File, args []string) {
	w.named("usr/lib/locale/C.utf8/LC_CTYPE") // what Python makes of the C locale, PEP 538
	// A virtual environment says so beside its bin folder or in it (PEP 405).
	w.named(path.Join(path.Dir(path.Dir(called)), "pyvenv.cfg"))
	w.named(path.Join(path.Dir(called), "pyvenv.cfg"))
	// The library lies beside the interpreter's folder: lib/python3.X/os.py is how Python itself finds it.
	version := strings.TrimPrefix(path.Base(f.Name), "python")
	lib := path.Join(path.Dir(path.Dir("/"+f.Name)), "lib", "python"+version)
	if _, ok := w.lookup(lib + "/os.py"); !ok {
		return
	}
	tag := ".cpython-" + strings.ReplaceAll(version, ".", "") + ".pyc"
	module := func(dir, name string) bool {
		compiled := path.Join(dir, path.Dir(name), "__pycache__", path.Base(name)+tag)
		if _, ok := w.named(compiled); ok {
			return true
		}
		_, ok := w.named(path.Join(dir, name+".py"))
		return ok
	}
	modules := startModules
	if minor, err := strconv.Atoi(strings.TrimPrefix(version, "3.")); err == nil && minor < 11 {
		modules = slices.Concat(startModules, frozenModules)
	}
	for _, m := range modules {
		module(lib, m)
	}
	for i, a := range args {
		if a != "-m" || i+1 == len(args) {
			continue
		}
		for _, m := range []string{"runpy", "importlib/__init__", "importlib/util", "importlib/machinery", "pkgutil"} {
			module(lib, m)
		}
		name := strings.ReplaceAll(args[i+1], ".", "/")
		for _, dir := range []string{
			path.Join("/", w.c.Dir), lib, lib + "/site-packages", path.Join(path.Dir(path.Dir(called)), "lib", path.Base(lib), "site-packages"),
			path.Join(path.Dir(lib), "python3/dist-packages"),
		} {
			pkg := module(dir, name+"/__init__")
			if module(dir, name+"/__main__") || pkg || module(dir, name) {
				break
			}
		}
		break
	}
}
