package serve

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// TestMain is also the other processes that the tests need.
func TestMain(m *testing.M) {
	switch os.Getenv("SERVE_TEST") {
	case "server":
		takeOver(os.Args[1])
	case "reader":
		readDirect(os.Args[1])
	}
	os.Exit(m.Run())
}

func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// A layer is files of one chunk each (the last one of several), and the blob they are in.
type layer struct {
	data [][]byte
	keys []store.Key
	blob []byte
	toc  *toc.TOC
}

const chunkSize = 64 << 10

func makeLayer(n int, size func(i int) int) *layer {
	l := &layer{toc: &toc.TOC{Compression: toc.Gzip}}
	var blob bytes.Buffer
	for i := range n {
		data := noise(uint64(i), size(i))
		e := toc.Entry{Name: fmt.Sprint(i), Type: toc.Regular, Size: int64(len(data)), FirstChunk: uint32(len(l.toc.Chunks))}
		for off := 0; off < len(data); off += chunkSize {
			p := data[off:min(off+chunkSize, len(data))]
			l.toc.Chunks = append(l.toc.Chunks, toc.Chunk{
				Digest: sha256.Sum256(p), FileOffset: int64(off), Size: int64(len(p)), Member: int64(blob.Len()),
			})
			z, _ := gzip.NewWriterLevel(&blob, gzip.NoCompression)
			z.Write(p)
			z.Close()
			e.NumChunks++
		}
		l.toc.Entries = append(l.toc.Entries, e)
		l.data = append(l.data, data)
		l.keys = append(l.keys, store.Key(toc.ObjectKey(l.toc.Content(&e))))
	}
	l.blob = blob.Bytes()
	l.toc.DataEnd = int64(blob.Len())
	return l
}

// A blob is a fetch.Blob that answers while go on is true, and else waits.
type blob struct {
	data  []byte
	stall func() bool
}

func (b *blob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	for b.stall() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return io.NopCloser(bytes.NewReader(b.data[off : off+n])), nil
}

// open opens the store in dir, and a queue with the chunk table in dir.
func open(dir string, b *blob, timeout time.Duration) (*store.Store, *fetch.Queue, error) {
	s, err := store.Open(filepath.Join(dir, "store"), nil)
	if err != nil {
		return nil, nil, err
	}
	q := fetch.New(s, fetch.Options{ReadTimeout: timeout})
	table, err := toc.OpenTable(filepath.Join(dir, "table"))
	if err != nil {
		return nil, nil, err
	}
	return s, q, q.Add(&fetch.Layer{Name: "the layer", Table: table, Blob: b})
}

// A world is a mounted layer.
type world struct {
	*layer
	t       testing.TB
	dir     string // has the store and the table
	mnt     string
	stalled atomic.Bool
	q       *fetch.Queue
	server  *Server
}

// enter mounts l, and unmounts it when the test ends.
func enter(t testing.TB, l *layer, timeout time.Duration) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount FUSE")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs FUSE")
	}
	dir, err := os.MkdirTemp("/dev/shm", "lazuli-test-")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{layer: l, t: t, dir: dir, mnt: t.TempDir()}
	table, err := toc.MarshalTable(l.toc)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "table"), table, 0o600); err != nil {
		t.Fatal(err)
	}
	s, q, err := open(dir, &blob{l.blob, w.stalled.Load}, timeout)
	if err != nil {
		t.Fatal(err)
	}
	w.q = q
	t.Cleanup(func() { q.Close(); s.Close() })
	if w.server, err = Mount(w.mnt, q, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Unmount(w.mnt, unix.MNT_DETACH)
		if err := w.server.Wait(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) path(i int) string { return filepath.Join(w.mnt, w.keys[i].Path()) }

// readFile is os.ReadFile for files that this process serves: os.Open would ask whether they can be polled, in a system
// call that Go's scheduler does not expect to wait.
func readFile(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var all []byte
	p := make([]byte, 100000)
	for {
		n, err := unix.Read(fd, p)
		if err != nil || n == 0 {
			return all, err
		}
		all = append(all, p[:n]...)
	}
}

// want reads file i and compares.
func (w *world) want(i int) {
	w.t.Helper()
	got, err := readFile(w.path(i))
	if err != nil {
		w.t.Error(err)
	} else if !bytes.Equal(got, w.data[i]) {
		w.t.Errorf("file %d: wrong bytes", i)
	}
}

func TestMount(t *testing.T) {
	w := enter(t, makeLayer(20, func(i int) int { return 1 + i*20000 }), 0)
	for i := range w.keys {
		fi, err := os.Stat(w.path(i))
		if err != nil || fi.Size() != int64(len(w.data[i])) || fi.Mode() != 0o444 {
			t.Errorf("file %d: %v, %v", i, fi, err)
		}
		w.want(i)
	}
	if fi, err := os.Stat(filepath.Dir(w.path(0))); err != nil || !fi.IsDir() {
		t.Errorf("folder: %v", err)
	}
	for _, dir := range []string{w.mnt, filepath.Dir(w.path(0))} {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("a listing has %d entries: %v", len(entries), err)
		}
	}
	for _, name := range []string{"x", "zz", "00/x", "00/" + w.keys[0].String()[2:], w.keys[0].Path() + "/x", "../x"} {
		if _, err := os.Lstat(filepath.Join(w.mnt, "00", "..") + "/" + name); err == nil {
			t.Errorf("%s is there", name)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(w.mnt, &st); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(w.mnt, "00", "new"), nil, 0o644); err == nil {
		t.Error("written to")
	}
}

// An object that was looked up in vain is found when a layer has it.
func TestLaterObject(t *testing.T) {
	w := enter(t, makeLayer(1, func(int) int { return 100 }), 0)
	l := makeLayer(3, func(int) int { return 200 })
	path := filepath.Join(w.mnt, l.keys[2].Path())
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	b, err := toc.MarshalTable(l.toc)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(w.dir, "second")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	table, err := toc.OpenTable(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.q.Add(&fetch.Layer{Name: "second", Table: table, Blob: &blob{l.blob, w.stalled.Load}}); err != nil {
		t.Fatal(err)
	}
	if got, err := readFile(path); err != nil || !bytes.Equal(got, l.data[2]) {
		t.Errorf("an object that appeared: %v", err)
	}
}

// waits returns when n reads wait for the network.
func (w *world) waits(n int64) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); w.q.Stats().Misses < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%d reads wait, not %d", w.q.Stats().Misses, n)
		}
	}
}

// A read waits no longer than it should, and nothing is remembered of its failure.
func TestTimeout(t *testing.T) {
	w := enter(t, makeLayer(2, func(int) int { return 1000 }), 200*time.Millisecond)
	w.stalled.Store(true)
	if _, err := readFile(w.path(0)); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a read that the network does not answer: %v", err)
	}
	w.stalled.Store(false)
	for end := time.Now().Add(20 * time.Second); ; {
		if got, err := readFile(w.path(0)); err == nil && bytes.Equal(got, w.data[0]) {
			break
		} else if time.Now().After(end) {
			t.Fatalf("after the network is back: %v", err)
		}
	}
	w.want(1)
}

// readDirect is a process that reads a file past the page cache and says what came of it.
func readDirect(path string) {
	f, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err == nil {
		p := make([]byte, 1<<20)
		var n int
		if n, err = unix.Read(f, p); err == nil {
			fmt.Printf("%x\n", sha256.Sum256(p[:n]))
			os.Exit(0)
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

func (w *world) reader(i int) (*exec.Cmd, *bytes.Buffer) {
	w.t.Helper()
	cmd := exec.Command(os.Args[0], w.path(i))
	cmd.Env = append(os.Environ(), "SERVE_TEST=reader")
	out := new(bytes.Buffer)
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	return cmd, out
}

// A process that waits for the network can be killed, also after other signals; and signals that do not kill are not seen
// by the read.
func TestSignals(t *testing.T) {
	w := enter(t, makeLayer(6, func(i int) int { return 1000 + i }), 0)
	w.stalled.Store(true)
	// Through the page cache, as nearly everybody.
	n := int64(0)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		cat := exec.Command("cat", w.path(int(n)))
		if err := cat.Start(); err != nil {
			t.Fatal(err)
		}
		n++
		w.waits(n)
		cat.Process.Signal(signal)
		if err := cat.Wait(); err == nil {
			t.Errorf("cat ended well after %v", signal)
		}
	}
	for i, signals := range [][]syscall.Signal{{syscall.SIGKILL}, {syscall.SIGTERM}, {syscall.SIGURG, syscall.SIGKILL}} {
		cmd, out := w.reader(2 + i)
		n++
		w.waits(n)
		for _, s := range signals {
			cmd.Process.Signal(s)
			if s == syscall.SIGURG { // which Go's runtime catches
				n++
				w.waits(n)
			}
		}
		if err := cmd.Wait(); err == nil || out.Len() > 0 {
			t.Errorf("%v: %v, %s", signals, err, out)
		}
	}
	cmd, out := w.reader(5)
	n++
	w.waits(n)
	cmd.Process.Signal(syscall.SIGURG)
	w.waits(n + 1)
	w.stalled.Store(false)
	if err := cmd.Wait(); err != nil || out.String() != fmt.Sprintf("%x\n", sha256.Sum256(w.data[5])) {
		t.Errorf("a read that a signal interrupted: %v, %s", err, out)
	}
}

// One server after the other serves a mount, in one process; the readers wait.
func TestStopResume(t *testing.T) {
	w := enter(t, makeLayer(6, func(i int) int { return 1000 + i }), 0)
	w.want(0)
	for i := 1; i < 6; i++ {
		keep, err := unix.FcntlInt(w.server.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.server.Stop(); err != nil {
			t.Fatal(err)
		}
		read := make(chan struct{})
		go func() { w.want(i); close(read) }()
		server, err := Resume(keep, w.server.Init(), w.q, nil)
		if err != nil {
			t.Fatal(err)
		}
		w.server = server
		<-read
	}
}

// What is here is opened, read and closed without a server.
func TestNoServer(t *testing.T) {
	w := enter(t, makeLayer(2, func(i int) int { return 1000 + i }), 0)
	w.want(0)
	w.want(1)
	keep, err := unix.FcntlInt(w.server.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.server.Stop(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { w.want(0); w.want(1); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("waits for a server")
	}
	if w.server, err = Resume(keep, w.server.Init(), w.q, nil); err != nil {
		t.Fatal(err)
	}
	<-done
}

// What Resume cannot use it leaves open.
func TestResumeNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to open /dev/fuse")
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	if _, err := Resume(fd, make([]byte, 100), nil, nil); err == nil {
		t.Fatal("resumed what was never mounted")
	}
	runtime.GC()
	runtime.GC()
	if err := unix.Close(fd); err != nil {
		t.Errorf("the descriptor was closed: %v", err)
	}
}

// takeOver is a server process: descriptor 3 is the connection; dir has all else.
func takeOver(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, "blob"))
	fail(err)
	init, err := os.ReadFile(filepath.Join(dir, "init"))
	fail(err)
	_, q, err := open(dir, &blob{data, func() bool {
		_, err := os.Stat(filepath.Join(dir, "stalled"))
		return err == nil
	}}, 0)
	fail(err)
	s, err := Resume(3, init, q, nil)
	fail(err)
	go func() {
		for {
			fmt.Println(q.Stats().Misses)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	fail(s.Wait())
	os.Exit(0)
}

// start starts a server process on the connection, and returns when it has taken as many reads as wait.
func (w *world) start(keep *os.File, waiting int) *exec.Cmd {
	w.t.Helper()
	cmd := exec.Command(os.Args[0], w.dir)
	cmd.Env = append(os.Environ(), "SERVE_TEST=server")
	cmd.ExtraFiles = []*os.File{keep}
	out, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		n, err := strconv.Atoi(lines.Text())
		if err != nil {
			w.t.Fatal(lines.Text())
		}
		if n >= waiting {
			break
		}
	}
	go io.Copy(io.Discard, out)
	return cmd
}

// The serving process is killed while 50 readers read what is not here, again and again. Each gets its bytes.
func TestTakenOver(t *testing.T) {
	const readers = 50
	w := enter(t, makeLayer(readers+1, func(i int) int { return 3*chunkSize + i }), 0)
	// A process that is forked from this one closes its files, and the kernel asks for a FLUSH until it is told that there is
	// none: who starts the server would wait for the server.
	w.want(readers)
	for name, b := range map[string][]byte{"blob": w.blob, "init": w.server.Init(), "stalled": nil} {
		if err := os.WriteFile(filepath.Join(w.dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.FcntlInt(w.server.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	keep := os.NewFile(uintptr(fd), "keep")
	if err := w.server.Stop(); err != nil {
		t.Fatal(err)
	}
	defer keep.Close() // ends the connection, and with it whoever still reads

	server := w.start(keep, 0)
	var all sync.WaitGroup
	for i := range readers {
		all.Go(func() { w.want(i) })
	}
	for range 4 {
		server.Process.Kill()
		server.Wait()
		server = w.start(keep, readers)
	}
	server.Process.Kill()
	server.Wait()
	os.Remove(filepath.Join(w.dir, "stalled"))
	server = w.start(keep, 0)
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("readers wait for ever")
	}
	server.Process.Kill()
	server.Wait()
}

// A READ that waits holds a buffer of the size that it asks for.
func TestAnswerSize(t *testing.T) {
	request := func(opcode byte, at int, size uint32) []byte {
		b := make([]byte, 80)
		b[4] = opcode
		for i := range 4 {
			b[at+i] = byte(size >> (8 * i))
		}
		return b
	}
	for _, x := range []struct {
		request []byte
		want    int
	}{
		{request(1, 56, 1<<20), smallAnswer},
		{request(15, 56, 4096), smallAnswer + 4096},
		{request(15, 56, 1<<20), smallAnswer + 1<<20},
		{request(15, 56, 1<<31), smallAnswer + 1<<20},
		{request(28, 56, 100), smallAnswer + 100},
		{request(22, 40, 255), smallAnswer + 255},
		{request(15, 4, 15)[:40], smallAnswer},
	} {
		n := answerSize(x.request)
		if n != x.want {
			t.Errorf("opcode %d: %d bytes, not %d", x.request[4], n, x.want)
		}
		b := buffers.get(n)
		if len(b) < n || len(b) >= 2*n {
			t.Errorf("a buffer of %d bytes for %d", len(b), n)
		}
		buffers.put(b)
	}
}

func BenchmarkRead(b *testing.B) {
	for _, size := range []int{4 << 10, 128 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			const length = 4 << 20
			w := enter(b, makeLayer(1, func(int) int { return length }), 0)
			w.want(0)
			f, err := unix.Open(w.path(0), unix.O_RDONLY|unix.O_DIRECT, 0) // past the page cache: each read is a READ
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(f)
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if n, err := unix.Pread(f, p, off); n != size {
					b.Fatal(n, err)
				}
				off = (off + int64(size)) % length
			}
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	const n = 10000
	w := enter(b, makeLayer(n, func(i int) int { return 8 + i%100 }), 0)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		if i%n == 0 { // the kernel remembers
			b.StopTimer()
			os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
			b.StartTimer()
		}
		var st unix.Stat_t
		if err := unix.Stat(w.path(i%n), &st); err != nil {
			b.Fatal(err)
		}
		i++
	}
}
