// Package closure finds what a command of an image needs before it does anything of its own, without running it: the program that the
// command line means, the interpreter and the shared libraries of an ELF file, the interpreter of a script, the files that the
// command line names, what the C library, a runtime and Python read at each start, and the modules that a Python program imports, and those import.
//
// What goes in is an image's tree ([Files]) and its command ([Command]); what comes out is a profile, as if a run had been recorded. It is a guess that
// costs little: what it lacks is fetched when it is wanted, and what is too much is some bytes. The same image gives the same profile.
//
// The files are a stranger's. Whatever is in them, nothing here takes more memory or time than the constants allow, and a file that
// cannot be understood ends its branch and is no error. Errors are those of [Files] alone.
//
// Sources: ld.so(8), ld.so.conf's include as ldconfig(8) has it, execve(2) for scripts, elf(5); the import system, the lexical analysis and site in
// Python's own documentation.
package closure

import (
	"bytes"
	"context"
	"path"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"lazuli/fs/elf"
	"lazuli/fs/profile"
)

// Files is the tree of an image.
type Files interface {
	// Lookup returns what is at a path, symlinks followed within the image; relative paths begin at the root.
	Lookup(path string) (File, bool)
	// List returns the names in a directory, sorted, or none.
	List(path string) []string
	// ReadAt fills p with the bytes of a file from off on, which are within it. It may be called concurrently.
	ReadAt(ctx context.Context, f File, p []byte, off int64) error
}

// A File is a file or directory of an image.
type File struct {
	Name    string // from the root, without a leading slash and without symlinks
	Regular bool
	Exec    bool  // somebody may execute it
	Size    int64 // in bytes
}

// A Command is what an image's config says that is to be run.
type Command struct {
	Args []string // the entrypoint's and the command's
	Env  []string
	Dir  string // where it begins
}

const (
	maxWhole = 8 << 20 // bytes of a file that is taken whole: python3.11 has 6.8 MB, and a start reads two thirds of it
	head     = 1 << 20 // bytes of the beginning of a larger one
	// maxSum is how many bytes of files are taken. The start of a robot's node reads 200 MB, mostly of 385 ELF files, and 307 MB are taken
	// for it, in a pack of 120 MB; without one it fetched 223 MB, compressed, as misses bring their neighbours.
	maxSum   = 320 << 20
	maxText  = 64 << 10 // bytes of a script, or a file of a loader's configuration, that are looked at
	maxDepth = 6        // of programs that run programs, and of files that include files

	maxLookups = 1 << 18
	readers    = 16 // side by side
)

// Of returns what a command needs, in the order in which it is read. It is empty if the image does not have the program.
func Of(ctx context.Context, files Files, c Command) (*profile.Profile, error) {
	w := &walk{reader: reader{ctx: ctx, files: files}, c: c, seen: map[string]bool{}, objects: map[string]*elf.File{}, taken: map[piece]bool{}}
	found := w.run(c.Args, 0)
	if w.err != nil {
		return nil, w.err
	}
	if !found {
		return new(profile.Profile), nil
	}
	return &w.p, nil
}

type piece struct {
	name  string
	index int
}

// A reader reads files. It reads nothing more once it has an error.
type reader struct {
	ctx   context.Context
	files Files
	err   error // of files
}

// A walk is one call of Of. Its methods do nothing once it has an error.
type walk struct {
	reader
	c Command

	p       profile.Profile
	taken   map[piece]bool
	sum     int64                // bytes of the pieces
	seen    map[string]bool      // ELF files that were taken
	objects map[string]*elf.File // what is known of ELF files, nil of others
	loader  *loader              // of the last program
	lookups int
	base    bool // the files of every start were taken
}

// take adds bytes of a file to the profile.
func (w *walk) take(f File, off, n int64) {
	for i := int(off / profile.PieceSize); int64(i)*profile.PieceSize < min(off+n, f.Size) && w.sum < maxSum; i++ {
		if id := (piece{f.Name, i}); !w.taken[id] {
			w.taken[id] = true
			w.sum += min(profile.PieceSize, f.Size-int64(i)*profile.PieceSize)
			w.p.Pieces = append(w.p.Pieces, profile.Piece{Path: f.Name, Index: i, Share: 1, MS: float64(len(w.p.Pieces)) / 1000})
		}
	}
}

// whole adds a file, or of a large one its beginning and its end, where archives have their lists.
func (w *walk) whole(f File) {
	if f.Size <= maxWhole {
		w.take(f, 0, f.Size)
		return
	}
	w.take(f, 0, head)
	w.take(f, f.Size-profile.PieceSize, profile.PieceSize)
}

// named adds the file at a path, if there is one.
func (w *walk) named(name string) (File, bool) {
	f, ok := w.lookup(name)
	if ok {
		w.whole(f)
	}
	return f, ok
}

// lookup returns the regular file at a path.
func (w *walk) lookup(name string) (File, bool) {
	if w.lookups++; w.lookups > maxLookups || name == "" || len(name) > 4096 || strings.IndexByte(name, 0) >= 0 || w.err != nil {
		return File{}, false
	}
	f, ok := w.files.Lookup(name)
	return f, ok && f.Regular
}

// read returns the bytes of a file from off on, at most n and no more than there are.
func (r *reader) read(f File, off, n int64) []byte {
	if r.err != nil || off < 0 || off >= f.Size || n <= 0 {
		return nil
	}
	p := make([]byte, min(n, f.Size-off))
	if r.err = r.files.ReadAt(r.ctx, f, p, off); r.err != nil {
		return nil
	}
	return p
}

// sideBySide calls do for 0 to n-1, each with a reader of its own, and waits for all: files are read over a network.
func (w *walk) sideBySide(n int, do func(r *reader, i int)) {
	if w.err != nil {
		return
	}
	group, ctx := errgroup.WithContext(w.ctx)
	group.SetLimit(readers)
	for i := range n {
		group.Go(func() error {
			r := reader{ctx: ctx, files: w.files}
			do(&r, i)
			return r.err
		})
	}
	w.err = group.Wait()
}

// abs returns a path of the command line from the root.
func (w *walk) abs(name string) string {
	if path.IsAbs(name) {
		return name
	}
	return path.Join("/", w.c.Dir, name)
}

// env returns the last value of a variable.
func (w *walk) env(name string) string {
	for _, e := range slices.Backward(w.c.Env) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// defaultPath is what runtimes look in when there is no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// program returns the path of the program that a word of a command line means.
func (w *walk) program(word string) (string, File, bool) {
	if strings.Contains(word, "/") {
		f, ok := w.lookup(w.abs(word))
		return w.abs(word), f, ok
	}
	dirs := w.env("PATH")
	if dirs == "" {
		dirs = defaultPath
	}
	all := strings.Split(dirs, ":")
	for _, dir := range w.ros() {
		all = append(all, dir+"/bin")
	}
	for _, dir := range all {
		name := path.Join(w.abs(dir), word)
		if f, ok := w.lookup(name); ok && f.Exec {
			return name, f, true
		}
	}
	return "", File{}, false
}

// ros returns where versions of ROS are. The file that entrypoints source before they run anything puts these at the beginning of the paths, whose ends they
// are here: a variable of the image's config does not have them.
func (w *walk) ros() (dirs []string) {
	for _, name := range w.files.List("opt/ros") {
		if len(dirs) < 4 {
			dirs = append(dirs, "/opt/ros/"+name)
		}
	}
	return dirs
}

// run adds what a command line needs, and reports whether its program is there.
func (w *walk) run(args []string, depth int) bool {
	if len(args) == 0 || depth > maxDepth {
		return false
	}
	name, f, ok := w.program(args[0])
	if !ok {
		return false
	}
	if !w.base { // who the user is, is read before the program
		w.base = true
		for _, name := range []string{"etc/passwd", "etc/group"} {
			w.named(name)
		}
	}
	start := w.read(f, 0, maxText)
	if line, ok := bytes.CutPrefix(start, []byte("#!")); ok {
		w.script(name, f, line, args, depth)
		return true
	}
	w.elf(f)
	w.named("etc/nsswitch.conf")
	base := path.Base(f.Name)
	word := path.Base(args[0])
	switch {
	case base == "busybox" && word != "busybox" || isShell(base) || isShell(word):
		w.shell(args[1:], depth)
	case strings.HasPrefix(base, "python"):
		w.python(name, f, args[1:])
	case word == "env" || base == "env":
		w.run(afterEnv(args[1:]), depth+1)
	case wrappers[word]:
		w.run(afterOptions(args[1:]), depth+1)
	}
	for _, a := range args[1:] {
		if !strings.HasPrefix(a, "-") {
			w.named(w.abs(a))
		}
	}
	return true
}

// script adds a script and its interpreter.
func (w *walk) script(name string, f File, line []byte, args []string, depth int) {
	w.whole(f)
	text := string(line)
	line, _, _ = bytes.Cut(line, []byte("\n"))
	words := strings.Fields(string(line[:min(len(line), 256)])) // BINPRM_BUF_SIZE
	if len(words) == 0 {
		return
	}
	command := words[:1]
	if rest := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(string(line)), words[0])); rest != "" {
		command = append(command, rest) // one argument, whatever is in it
	}
	if path.Base(words[0]) == "env" {
		command = words
	}
	w.run(append(slices.Clip(command), append([]string{name}, args[1:]...)...), depth+1)
	// An entrypoint that prepares something and then becomes its arguments.
	if strings.Contains(text, `exec "$@"`) || strings.Contains(text, `exec $@`) {
		w.run(args[1:], depth+1)
	}
}

func isShell(name string) bool {
	return slices.Contains([]string{"sh", "bash", "dash", "ash", "zsh", "ksh"}, name)
}

// wrappers are programs that run what follows their options.
var wrappers = map[string]bool{"tini": true, "dumb-init": true, "catatonit": true, "exec": true, "nohup": true, "nice": true, "setsid": true, "stdbuf": true}

func afterOptions(args []string) []string {
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		end := args[0] == "--"
		args = args[1:]
		if end {
			break
		}
	}
	return args
}

// afterEnv returns the command that env runs.
func afterEnv(args []string) []string {
	for len(args) > 0 {
		a := args[0]
		switch {
		case a == "-S" || a == "--split-string":
			if len(args) > 1 {
				return afterEnv(append(strings.Fields(args[1]), args[2:]...))
			}
		case strings.HasPrefix(a, "-S"):
			return afterEnv(append(strings.Fields(a[2:]), args[1:]...))
		case a == "-u" || a == "-C":
			args = args[1:]
		case strings.HasPrefix(a, "-"), strings.Contains(a, "="):
		default:
			return args
		}
		if len(args) > 0 {
			args = args[1:]
		}
	}
	return nil
}

// shell adds what a shell runs, if that is easily seen: the first simple command of -c, without anything that the shell would
// have to expand.
func (w *walk) shell(args []string, depth int) {
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		c := strings.Contains(args[0], "c") && !strings.HasPrefix(args[0], "--")
		args = args[1:]
		if !c || len(args) == 0 {
			continue
		}
		text, _, _ := strings.Cut(args[0], ";")
		text, _, _ = strings.Cut(text, "&&")
		text, _, _ = strings.Cut(text, "\n")
		words := strings.Fields(text)
		for len(words) > 0 && (words[0] == "exec" || strings.Contains(words[0], "=")) {
			words = words[1:]
		}
		if len(words) == 0 || strings.ContainsAny(words[0], "|&<>()$`\\\"'*?[#~{") {
			return
		}
		words = slices.DeleteFunc(words, func(s string) bool { return strings.ContainsAny(s, "|&<>()$`\\*?[#~{") })
		for i := range words {
			words[i] = strings.Trim(words[i], `"'`)
		}
		w.run(words, depth+1)
		return
	}
}
