package closure

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"path"
	"slices"
	"strings"
)

const (
	maxSegments = 256
	maxDynamic  = 64 << 10 // bytes
	maxObjects  = 512      // files that one program loads
)

// An object is what the loader reads of an ELF file.
type object struct {
	class          elf.Class
	machine        elf.Machine
	dynamic        int64 // where the dynamic section begins
	interpreter    string
	needed         []string
	rpath, runpath []string
}

// parse returns what the loader reads of a file: its program headers and the dynamic section, not the section headers, which a
// loader does not need and which lie at the other end. It is nil if f is no ELF file that can be loaded.
func (w *walk) parse(f File) *object {
	h := w.read(f, 0, 64)
	if len(h) < 52 || string(h[:4]) != elf.ELFMAG {
		return nil
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(h[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	o := &object{class: elf.Class(h[elf.EI_CLASS]), machine: elf.Machine(order.Uint16(h[18:]))}
	wide := o.class == elf.ELFCLASS64
	if !wide && o.class != elf.ELFCLASS32 || wide && len(h) < 64 {
		return nil
	}
	word := func(b []byte, at32, at64 int) uint64 { // of a structure, by its offset in the two classes
		if wide {
			return order.Uint64(b[at64:])
		}
		return uint64(order.Uint32(b[at32:]))
	}
	phoff, phnum, phsize := word(h, 28, 32), int64(order.Uint16(h[44:])), int64(32)
	if wide {
		phnum, phsize = int64(order.Uint16(h[56:])), 56
	}
	if phnum > maxSegments || phoff > uint64(f.Size) {
		return nil
	}
	headers := w.read(f, int64(phoff), phnum*phsize)
	type load struct{ vaddr, off, size uint64 }
	var loads []load
	var dynamic []byte
	for ; len(headers) >= int(phsize); headers = headers[phsize:] {
		off, vaddr, size := word(headers, 4, 8), word(headers, 8, 16), word(headers, 16, 32)
		if off > uint64(f.Size) {
			continue
		}
		size = min(size, uint64(f.Size)-off)
		switch elf.ProgType(order.Uint32(headers)) {
		case elf.PT_LOAD:
			loads = append(loads, load{vaddr, off, size})
		case elf.PT_INTERP:
			o.interpreter = text(w.read(f, int64(off), int64(min(size, 4096))))
		case elf.PT_DYNAMIC:
			dynamic = w.read(f, int64(off), int64(min(size, maxDynamic)))
			o.dynamic = int64(off)
		}
	}
	var strtab uint64
	type value struct {
		tag elf.DynTag
		at  uint64
	}
	var values []value
	size := 8
	if wide {
		size = 16
	}
	for ; len(dynamic) >= size; dynamic = dynamic[size:] {
		tag, v := elf.DynTag(word(dynamic, 0, 0)), word(dynamic, 4, 8)
		if tag == elf.DT_NULL {
			break
		}
		switch tag {
		case elf.DT_STRTAB:
			strtab = v
		case elf.DT_NEEDED, elf.DT_RPATH, elf.DT_RUNPATH:
			if len(values) < maxNeeded {
				values = append(values, value{tag, v})
			}
		}
	}
	at := func(addr uint64) string {
		for _, l := range loads {
			if addr >= l.vaddr && addr-l.vaddr < l.size {
				return text(w.read(f, int64(l.off+addr-l.vaddr), int64(min(4096, l.size-(addr-l.vaddr)))))
			}
		}
		return ""
	}
	for _, v := range values {
		s := at(strtab + v.at)
		switch {
		case s == "":
		case v.tag == elf.DT_NEEDED:
			o.needed = append(o.needed, s)
		case v.tag == elf.DT_RPATH:
			o.rpath = append(o.rpath, split(s)...)
		default:
			o.runpath = append(o.runpath, split(s)...)
		}
	}
	return o
}

// text returns the string that ends at the first NUL of b, "" if it does not end.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return string(b[:i])
	}
	return ""
}

func split(paths string) []string {
	list := strings.FieldsFunc(paths, func(r rune) bool { return r == ':' || r == ';' })
	return list[:min(len(list), 64)]
}

// elf adds an ELF file with its interpreter and the libraries that it and they need, in the order in which a loader opens them.
func (w *walk) elf(f File) {
	main := w.parse(f)
	w.whole(f)
	if main == nil || w.seen[f.Name] {
		return
	}
	w.take(f, main.dynamic, maxDynamic)
	w.seen[f.Name] = true
	if main.interpreter == "" {
		return // it is static, or is not for running
	}
	w.named(main.interpreter)
	var dirs []string // that all look in at last
	if strings.Contains(main.interpreter, "ld-musl") {
		name := strings.TrimSuffix(path.Base(main.interpreter), ".so.1")
		if conf, ok := w.named("etc/" + name + ".path"); ok {
			dirs = strings.FieldsFunc(string(w.read(conf, 0, maxText)), func(r rune) bool { return r == ':' || r == '\n' })
		} else {
			dirs = []string{"/lib", "/usr/local/lib", "/usr/lib"}
		}
	} else {
		preload, _ := w.named("etc/ld.so.preload")
		main.needed = append(strings.Fields(string(w.read(preload, 0, maxText))), main.needed...)
		w.named("etc/ld.so.cache")
		dirs = w.conf("etc/ld.so.conf", 0, nil)
		dirs = append(dirs, defaults(path.Dir(main.interpreter), main)...)
	}
	main.needed = append(strings.FieldsFunc(w.env("LD_PRELOAD"), func(r rune) bool { return r == ':' || r == ' ' }), main.needed...)
	type loaded struct {
		*object
		name string // of the file
	}
	queue := []loaded{{main, f.Name}}
	here := map[string]bool{} // by the names that others need
	for at := 0; at < len(queue); at++ {
		o := queue[at]
		for _, name := range o.needed {
			if here[name] || len(queue) > maxObjects {
				continue
			}
			here[name] = true
			var look []string
			switch {
			case strings.Contains(name, "/"):
				look = []string{w.abs(name)}
			default:
				if len(o.runpath) == 0 {
					look = append(look, origin(o.rpath, o.name)...)
					look = append(look, origin(main.rpath, f.Name)...)
				}
				look = append(look, split(w.env("LD_LIBRARY_PATH"))...)
				look = append(look, origin(o.runpath, o.name)...)
				look = append(slices.Clip(look), dirs...)
				for i := range look {
					look[i] = path.Join(w.abs(look[i]), name)
				}
			}
			for _, name := range look {
				lib, ok := w.lookup(name)
				if !ok {
					continue
				}
				x := w.parse(lib)
				if x == nil || x.class != main.class || x.machine != main.machine {
					continue // the loader goes on too
				}
				if !w.seen[lib.Name] {
					w.seen[lib.Name] = true
					w.whole(lib)
					w.take(lib, x.dynamic, maxDynamic)
				}
				queue = append(queue, loaded{x, lib.Name})
				break
			}
		}
	}
}

// origin replaces $ORIGIN in the paths of a file, and $LIB by each that it may be.
func origin(paths []string, file string) (list []string) {
	dir := "/" + path.Dir(file)
	for _, p := range paths {
		p = strings.ReplaceAll(strings.ReplaceAll(p, "${ORIGIN}", dir), "$ORIGIN", dir)
		if !strings.Contains(p, "$LIB") && !strings.Contains(p, "${LIB}") {
			list = append(list, p)
			continue
		}
		for _, lib := range []string{"lib64", "lib"} {
			list = append(list, strings.ReplaceAll(strings.ReplaceAll(p, "${LIB}", lib), "$LIB", lib))
		}
	}
	return list
}

// triplets are the names of Debian's folders.
var triplets = map[elf.Machine]string{
	elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_386: "i386-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu", elf.EM_ARM: "arm-linux-gnueabihf",
	elf.EM_PPC64: "powerpc64le-linux-gnu", elf.EM_S390: "s390x-linux-gnu", elf.EM_RISCV: "riscv64-linux-gnu",
}

// defaults are the folders that a loader looks in without being told. Which they are was decided when it was built; that these
// are looked in too costs nothing.
func defaults(interpreter string, o *object) []string {
	dirs := []string{interpreter}
	if t := triplets[o.machine]; t != "" {
		dirs = append(dirs, "/lib/"+t, "/usr/lib/"+t)
	}
	if o.class == elf.ELFCLASS64 {
		dirs = append(dirs, "/lib64", "/usr/lib64")
	}
	return append(dirs, "/lib", "/usr/lib")
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
