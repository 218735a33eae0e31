// Workload is what runs in the container of TestSurvive, and what writes the layer that it runs on.
//
//	workload layer F    writes a layer, as a tar, to the file F
//	workload never F    writes another one, of files that nobody reads before the end
//	workload run N      reads, maps, executes, writes, copies up and renames until SIGTERM, in N processes
//	workload worker I   is one of them
//	workload check …    reads files of the layer
//	workload again …    reads files of the layer, counts how often it did so in this container, and sleeps
//
// The content of a file of the layer is made from its name, so that whoever reads can tell whether it is right. Whatever
// goes wrong is a line that begins with FAILED.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// What the layers have, by folder. Files of own are changed, each by one worker; the others are never.
const (
	dataFiles = 400
	ownFiles  = 80 // of each worker
	workers   = 4
	soleFiles = 20 // in each of fresh, here and never
)

// A file's name says its size, and with x in front that it can be executed.
func dataName(i int) string {
	kind := ""
	if i%4 == 3 {
		kind = "x"
	}
	return fmt.Sprintf("data/%s%d-%d", kind, i, 64<<10<<(i%5))
}

func ownName(worker, i int) string {
	return fmt.Sprintf("own/%d/%d/f%d-%d", worker, i, i, 40_000*(1+i%5))
}

func soleName(folder string, i int) string { return fmt.Sprintf("%s/%d-%d", folder, i, 300_000) }

func sizeOf(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	if err != nil {
		panic(err)
	}
	return n
}

func isProgram(name string) bool { return strings.Contains(name, "/x") }

// exitCode is what a program of the layer ends with.
func exitCode(name string) int { return int(sha256.Sum256([]byte(name))[0]) }

const block = 64 << 10

// content returns n bytes from off on of the layer's file.
func content(name string, off, n int) []byte {
	var b []byte
	for i := off / block; i*block < off+n; i++ {
		seed := sha256.Sum256(fmt.Append(nil, name, " ", i))
		p := make([]byte, block)
		rand.NewChaCha8(seed).Read(p)
		b = append(b, p...)
	}
	first := off / block * block
	if isProgram(name) {
		p := program(sizeOf(name), exitCode(name))
		if first == 0 {
			copy(b, p.header)
		}
		if at := p.codeAt - first; at >= 0 && at < len(b) {
			copy(b[at:], p.code)
		}
	}
	return b[off-first:][:n]
}

// An elf is the smallest program that there is: all of the file is its one segment, and it ends at once.
type elf struct {
	header, code []byte
	codeAt       int // near the end of the file, so that the kernel has to fetch that too
}

func program(size, exit int) elf {
	const base = 0x400000
	p := elf{codeAt: size - 64}
	h := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	le := binary.LittleEndian
	h = le.AppendUint16(h, 2)                         // ET_EXEC
	h = le.AppendUint16(h, 62)                        // EM_X86_64
	h = le.AppendUint32(h, 1)                         // version
	h = le.AppendUint64(h, uint64(base+p.codeAt))     // entry
	h = le.AppendUint64(h, 64)                        // program headers
	h = append(h, make([]byte, 8+4)...)               // no sections, no flags
	for _, v := range []uint16{64, 56, 1, 64, 0, 0} { // sizes and numbers of headers
		h = le.AppendUint16(h, v)
	}
	h = le.AppendUint32(h, 1)   // PT_LOAD
	h = le.AppendUint32(h, 4|1) // readable, executable
	for _, v := range []uint64{0, base, base, uint64(size), uint64(size), 4096} {
		h = le.AppendUint64(h, v)
	}
	p.header = h
	p.code = append(le.AppendUint32([]byte{0xbf}, uint32(exit)), 0xb8, 60, 0, 0, 0, 0x0f, 0x05) // mov edi, exit; mov eax, SYS_exit; syscall
	return p
}

func writeLayer(path string, names []string) (err error) {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	w := tar.NewWriter(out)
	dirs := map[string]bool{}
	for _, name := range names {
		var missing []string
		for d := filepath.Dir(name); d != "." && !dirs[d]; d = filepath.Dir(d) {
			dirs[d] = true
			missing = append(missing, d)
		}
		for _, d := range slices.Backward(missing) {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}); err != nil {
				return err
			}
		}
		size := sizeOf(name)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(size)}); err != nil {
			return err
		}
		if _, err := w.Write(content(name, 0, size)); err != nil {
			return err
		}
	}
	return w.Close()
}

func layer() (names []string) {
	for i := range soleFiles {
		names = append(names, soleName("here", i), soleName("fresh", i))
	}
	for i := range ownFiles {
		for w := range workers {
			names = append(names, ownName(w, i))
		}
	}
	for i := range dataFiles {
		names = append(names, dataName(i))
	}
	return names
}

func never() (names []string) {
	for i := range soleFiles {
		names = append(names, soleName("never", i))
	}
	return names
}

// A worker is one process of the workload.
type worker struct {
	id     int
	rand   *rand.Rand
	order  []int // of the files of data, as it comes to them
	seen   int   // how many it has come to
	own    int
	ops    int
	failed int
	bytes  int64
}

func (w *worker) fail(what string, err error) {
	w.failed++
	fmt.Printf("FAILED worker %d operation %d: %s: %v\n", w.id, w.ops, what, err)
}

// same compares what was read at off of a file with what is there.
func same(name string, off int, got []byte) error {
	want := content(name, off, len(got))
	if bytes.Equal(got, want) {
		return nil
	}
	at := 0
	for got[at] == want[at] {
		at++
	}
	zeros := len(got[at:]) - len(bytes.TrimLeft(got[at:], "\x00"))
	return fmt.Errorf("wrong at byte %d of %d from %d on, where %d zeros are", off+at, len(got), off, zeros)
}

func (w *worker) pread(name string) error {
	f, err := os.Open("/" + name)
	if err != nil {
		return err
	}
	defer f.Close()
	size := sizeOf(name)
	off := w.rand.IntN(size)
	p := make([]byte, min(1+w.rand.IntN(256<<10), size-off))
	if _, err := f.ReadAt(p, int64(off)); err != nil {
		return err
	}
	w.bytes += int64(len(p))
	return same(name, off, p)
}

func readWhole(path, name string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(b) != sizeOf(name) {
		return fmt.Errorf("%d bytes, want %d", len(b), sizeOf(name))
	}
	return same(name, 0, b)
}

func (w *worker) whole(name string) error {
	w.bytes += int64(sizeOf(name))
	return readWhole("/"+name, name)
}

// mmap maps a file and looks at some of its pages.
func (w *worker) mmap(name string) (err error) {
	f, err := os.Open("/" + name)
	if err != nil {
		return err
	}
	defer f.Close()
	size := sizeOf(name)
	m, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, syscall.Munmap(m)) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	for range 4 {
		off := w.rand.IntN(size)
		p := bytes.Clone(m[off:min(off+5000, size)])
		w.bytes += int64(len(p))
		if err := same(name, off, p); err != nil {
			return err
		}
	}
	return nil
}

func execute(name string) error {
	err := exec.Command("/" + name).Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() && exit.ExitCode() == exitCode(name) || err == nil && exitCode(name) == 0 {
		return nil
	}
	return fmt.Errorf("%v, want exit status %d", err, exitCode(name))
}

func stat(name string) error {
	fi, err := os.Stat("/" + name)
	if err == nil && (fi.Size() != int64(sizeOf(name)) || fi.Mode() != 0o755) {
		err = fmt.Errorf("%d bytes, mode %v", fi.Size(), fi.Mode())
	}
	return err
}

func (w *worker) list() error {
	entries, err := os.ReadDir("/data")
	if err == nil && len(entries) != dataFiles {
		err = fmt.Errorf("%d files, want %d", len(entries), dataFiles)
	}
	if _, err := os.Stat(fmt.Sprintf("/data/none%d", w.ops)); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("a file that is nowhere: %v", err)
	}
	return err
}

// write makes a file, reads it, renames it, reads it again and removes it.
func (w *worker) write() error {
	name := fmt.Sprintf("/tmp/%d-%d", w.id, w.ops)
	b := content(name, 0, 1+w.rand.IntN(100_000))
	if err := os.WriteFile(name, b, 0o644); err != nil {
		return err
	}
	for _, path := range []string{name, name + ".renamed"} {
		got, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, b) {
			return fmt.Errorf("%s is not what was written", path)
		}
		if path == name {
			if err := os.Rename(name, name+".renamed"); err != nil {
				return err
			}
		}
	}
	return os.Remove(name + ".renamed")
}

// change changes a file of the image, for the first time, in one of the ways that overlayfs treats each differently.
func (w *worker) change() error {
	name := ownName(w.id, w.own%ownFiles)
	how := w.own % 4
	if w.own++; w.own > ownFiles {
		return w.changed(w.rand.IntN(ownFiles))
	}
	path := "/" + name
	switch how {
	case 0: // its data are copied up
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte("mine"), 10_000)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	case 1: // only its attributes are
		if err := os.Chmod(path, 0o700); err != nil {
			return err
		}
	case 2: // and a redirect
		if err := os.Rename(path, path+"-moved"); err != nil {
			return err
		}
	case 3: // the folder above is
		if err := os.Rename(filepath.Dir(path), filepath.Dir(path)+"-moved"); err != nil {
			return err
		}
	}
	return w.changed(w.own - 1)
}

// changed looks at a file that was changed.
func (w *worker) changed(i int) error {
	name := ownName(w.id, i)
	path := "/" + name
	switch i % 4 {
	case 0:
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if len(b) < 10_004 || string(b[10_000:10_004]) != "mine" {
			return errors.New("what was written into it is not there")
		}
		copy(b[10_000:], content(name, 10_000, 4))
		return same(name, 0, b)
	case 2:
		path += "-moved"
	case 3:
		path = filepath.Dir(path) + "-moved/" + filepath.Base(path)
	}
	w.bytes += int64(sizeOf(name))
	return readWhole(path, name)
}

// step does one operation.
func (w *worker) step() {
	w.ops++
	i := w.order[w.rand.IntN(max(w.seen, 1))]
	if w.rand.IntN(6) == 0 && w.seen < len(w.order) {
		i = w.order[w.seen]
		w.seen++
	}
	name := dataName(i)
	var what string
	var err error
	switch n := w.rand.IntN(24); {
	case n < 4:
		what, err = "pread "+name, w.pread(name)
	case n < 8 && isProgram(name):
		what, err = "exec "+name, execute(name)
	case n < 8:
		what, err = "mmap "+name, w.mmap(name)
	case n < 12:
		what, err = "read "+name, w.whole(name)
	case n < 15:
		what, err = "list", w.list()
	case n < 18:
		what, err = "stat "+name, stat(name)
	case n < 22:
		what, err = "write", w.write()
	default:
		what, err = fmt.Sprintf("change %d", w.own), w.change()
	}
	if err != nil {
		w.fail(what, err)
	}
}

func (w *worker) run(stop <-chan os.Signal) {
	for {
		select {
		case <-stop:
			fmt.Printf("DONE worker %d: %d operations, %d failed, %d files, %d bytes\n", w.id, w.ops, w.failed, w.seen, w.bytes)
			if w.failed > 0 {
				os.Exit(1)
			}
			return
		default:
		}
		w.step()
		if w.ops%10 == 0 {
			fmt.Printf("worker %d: %d operations, %d files\n", w.id, w.ops, w.seen)
		}
	}
}

// run starts workers, and ends them on SIGTERM.
func run(n int) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	ended := make(chan error)
	var all []*exec.Cmd
	for i := range n {
		c := exec.Command("/proc/self/exe", "worker", fmt.Sprint(i))
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		if err := c.Start(); err != nil {
			return err
		}
		all = append(all, c)
		go func() { ended <- c.Wait() }()
	}
	stopped := false
	for left := n; left > 0; {
		select {
		case <-stop:
			stopped = true
			for _, c := range all {
				c.Process.Signal(syscall.SIGTERM)
			}
		case err := <-ended:
			if left--; err != nil || !stopped {
				fmt.Println("FAILED a worker has ended:", err)
			}
		}
	}
	fmt.Println("DONE all")
	return nil
}

// check reads files of the layer, and the program itself, so that all of it is here.
func check(names []string) error {
	if _, err := os.ReadFile("/proc/self/exe"); err != nil {
		return err
	}
	for _, name := range names {
		if err := readWhole("/"+name, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	fmt.Printf("RIGHT %d files\n", len(names))
	return nil
}

func again(names []string) error {
	if err := check(names); err != nil {
		return err
	}
	f, err := os.OpenFile("/tmp/runs", os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	if _, err := f.WriteString("."); err != nil {
		return err
	}
	b, err := os.ReadFile("/tmp/runs")
	if err != nil {
		return err
	}
	fmt.Printf("RUN %d\n", len(b))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	return f.Close()
}

func main() {
	var err error
	switch args := os.Args[2:]; os.Args[1] {
	case "layer":
		err = writeLayer(args[0], layer())
	case "never":
		err = writeLayer(args[0], never())
	case "run":
		var n int
		if n, err = strconv.Atoi(args[0]); err == nil {
			err = run(n)
		}
	case "worker":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		id, _ := strconv.Atoi(args[0])
		w := &worker{id: id, rand: rand.New(rand.NewPCG(uint64(id), 1))}
		w.order = w.rand.Perm(dataFiles)
		w.run(stop)
	case "check":
		err = check(args)
	case "again":
		err = again(args)
	}
	if err != nil {
		fmt.Println("FAILED", err)
		os.Exit(1)
	}
}
