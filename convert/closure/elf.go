package closure

import (
	"path"
	"strings"

	"lazuli/fs/elf"
)

// maxObjects is how many files are looked at.
const maxObjects = 2048

// parse returns what the loader reads of a file, or nil if that is no ELF file that can be loaded.
func (r *reader) parse(f File) *elf.File {
	return elf.Parse(f.Size, func(off, n int64) []byte { return r.read(f, off, n) })
}

// segments adds what a start reads of an ELF file.
func (w *walk) segments(f File, o *elf.File) {
	if len(o.Loads) == 0 {
		w.whole(f)
		return
	}
	for _, p := range o.Parts(f.Size) {
		w.take(f, p.Off, p.Size)
	}
}

// object returns what the loader reads of an ELF file, nil if it is none.
func (w *walk) object(f File) *elf.File {
	o, ok := w.objects[f.Name]
	if !ok && len(w.objects) < maxObjects {
		o = w.parse(f)
		w.objects[f.Name] = o
	}
	return o
}

// A loader loads ELF files into one process.
type loader struct {
	w    *walk
	main *elf.File
	file File            // of main
	dirs []string        // that are looked in at last
	here map[string]bool // by the names that others need
}

// elf adds an ELF file with its interpreter and the libraries that it and they need, in the order in which a loader opens them.
func (w *walk) elf(f File) {
	o := w.object(f)
	if o == nil {
		w.whole(f)
		return
	}
	main := *o
	l := &loader{w: w, main: &main, file: f, here: map[string]bool{}}
	w.loader = l
	w.segments(f, o)
	if main.Interpreter == "" {
		return // it is static, or is not for running
	}
	w.named(main.Interpreter)
	if strings.Contains(main.Interpreter, "ld-musl") {
		name := strings.TrimSuffix(path.Base(main.Interpreter), ".so.1")
		if conf, ok := w.named("etc/" + name + ".path"); ok {
			l.dirs = strings.FieldsFunc(string(w.read(conf, 0, maxText)), func(r rune) bool { return r == ':' || r == '\n' })
		} else {
			l.dirs = []string{"/lib", "/usr/local/lib", "/usr/lib"}
		}
	} else {
		preload, _ := w.named("etc/ld.so.preload")
		main.Needed = append(strings.Fields(string(w.read(preload, 0, maxText))), main.Needed...)
		w.named("etc/ld.so.cache")
		l.dirs = w.conf("etc/ld.so.conf", 0, nil)
		l.dirs = append(append(l.dirs, path.Dir(main.Interpreter)), main.Folders()...)
	}
	main.Needed = append(strings.FieldsFunc(w.env("LD_PRELOAD"), func(r rune) bool { return r == ':' || r == ' ' }), main.Needed...)
	l.needed(&main, f)
}

// load adds a library that the program opens while it runs, and what that needs.
func (l *loader) load(f File) {
	o := l.w.object(f)
	switch {
	case o == nil:
		l.w.whole(f)
	case !l.w.seen[f.Name]:
		l.w.seen[f.Name] = true
		l.w.segments(f, o)
		l.needed(o, f)
	}
}

// needed adds the libraries that o, which is in f, and they themselves need.
func (l *loader) needed(o *elf.File, f File) {
	w := l.w
	l.ahead([]File{f}, o)
	type loaded struct {
		object *elf.File
		file   File
	}
	queue := []loaded{{o, f}}
	for at := 0; at < len(queue); at++ {
		for _, name := range queue[at].object.Needed {
			if l.here[name] {
				continue
			}
			l.here[name] = true
			for _, place := range l.places(queue[at].object, queue[at].file, name) {
				lib, ok := w.lookup(place)
				if !ok {
					continue
				}
				x := w.object(lib)
				if x == nil || x.Class != l.main.Class || x.Machine != l.main.Machine {
					continue // the loader goes on too
				}
				if !w.seen[lib.Name] {
					w.seen[lib.Name] = true
					w.segments(lib, x)
				}
				queue = append(queue, loaded{x, lib})
				break
			}
		}
	}
}

// ahead reads what the loader reads of files and of all that they need, side by side; first is what is in the first file, if it is known.
func (l *loader) ahead(files []File, first *elf.File) {
	w := l.w
	asked := map[string]bool{}
	for len(files) > 0 {
		var unknown []File
		for _, f := range files {
			if _, ok := w.objects[f.Name]; !ok && len(w.objects) < maxObjects {
				w.objects[f.Name] = nil
				unknown = append(unknown, f)
			}
		}
		objects := make([]*elf.File, len(unknown))
		w.sideBySide(len(unknown), func(r *reader, i int) { objects[i] = r.parse(unknown[i]) })
		for i, f := range unknown {
			w.objects[f.Name] = objects[i]
		}
		var next []File
		for _, f := range files {
			o := w.objects[f.Name]
			if first != nil {
				o, first = first, nil
			}
			if o == nil {
				continue
			}
			for _, name := range o.Needed {
				if l.here[name] || asked[name] {
					continue
				}
				asked[name] = true
				for _, place := range l.places(o, f, name) {
					if lib, ok := w.lookup(place); ok {
						next = append(next, lib)
						break
					}
				}
			}
		}
		files = next
	}
}

// places returns the paths at which a loader looks for a library that o, which is in f, needs.
func (l *loader) places(o *elf.File, f File, name string) []string {
	if strings.Contains(name, "/") {
		return []string{l.w.abs(name)}
	}
	var look []string
	if len(o.RunPath) == 0 {
		look = append(look, elf.Origin(o.RPath, f.Name)...)
		look = append(look, elf.Origin(l.main.RPath, l.file.Name)...)
	}
	look = append(look, elf.Split(l.w.env("LD_LIBRARY_PATH"))...)
	look = append(look, elf.Origin(o.RunPath, f.Name)...)
	look = append(look, l.dirs...)
	for i := range look {
		look[i] = path.Join(l.w.abs(look[i]), name)
	}
	return look
}

// conf returns the folders that a file of the loader's configuration and those that it includes name. The files themselves are read by
// ldconfig alone, when the cache is made.
func (w *walk) conf(name string, depth int, dirs []string) []string {
	f, ok := w.lookup(name)
	if !ok || depth > maxDepth {
		return dirs
	}
	for line := range strings.Lines(string(w.read(f, 0, maxText))) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if len(dirs) > 128 || line == "" {
			continue
		}
		pattern, ok := strings.CutPrefix(line, "include")
		if !ok || strings.TrimLeft(pattern, " \t") == pattern {
			dirs = append(dirs, line)
			continue
		}
		pattern = strings.TrimSpace(pattern)
		if !path.IsAbs(pattern) {
			pattern = path.Join("/", path.Dir(name), pattern)
		}
		for _, x := range w.files.List(path.Dir(pattern)) {
			if ok, err := path.Match(path.Base(pattern), x); ok && err == nil && len(dirs) <= 128 {
				dirs = w.conf(path.Join(path.Dir(pattern), x), depth+1, dirs)
			}
		}
	}
	return dirs
}
