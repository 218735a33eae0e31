package integration

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"lazuli/convert"
)

// quiet waits until the daemon fetches nothing: it reads ahead of readers who have what they want.
func (d *Daemon) quiet(t testing.TB) {
	t.Helper()
	eventually(t, "something is still being fetched", func() bool {
		body, err := d.get("/v1/status")
		must(t, err)
		var status struct{ Fetching []struct{ Layer string } }
		must(t, json.Unmarshal([]byte(body), &status))
		return len(status.Fetching) == 0
	})
}

// eventually waits until something is as it should be.
func eventually(t testing.TB, otherwise string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %v: %s", patience, otherwise)
		}
	}
}

// loops counts the loop devices in a list of traces.
func loops(traces []string) (n int) {
	for _, s := range traces {
		if strings.HasPrefix(s, "loop") {
			n++
		}
	}
	return n
}

// overlaps returns which bytes of the blobs, whatever repository they were asked of, the log has more than one request for.
func overlaps(log []Request, blobs []string) (list []string) {
	type span struct{ from, to int64 }
	spans := map[string][]span{}
	for _, q := range log {
		digest := filepath.Base(q.Path)
		if q.Method != "GET" || !slices.Contains(blobs, digest) {
			continue
		}
		s := span{0, math.MaxInt64}
		fmt.Sscanf(q.Range, "bytes=%d-%d", &s.from, &s.to)
		spans[digest] = append(spans[digest], s)
	}
	for digest, l := range spans {
		slices.SortFunc(l, func(a, b span) int { return cmp.Compare(a.from, b.from) })
		to := int64(-1)
		for _, s := range l {
			if s.from <= to {
				list = append(list, fmt.Sprintf("%s, bytes %d to %d", digest, s.from, min(s.to, to)))
			}
			to = max(to, s.to)
		}
	}
	return list
}

// TestOverlaps: ranges that overlap are seen, those that touch are not taken for such.
func TestOverlaps(t *testing.T) {
	get := func(repo, digest, r string) Request {
		return Request{Method: "GET", Path: "/v2/" + repo + "/blobs/" + digest, Range: r}
	}
	for _, c := range []struct {
		log  []Request
		want int
	}{
		{[]Request{get("a", "x", "bytes=0-9"), get("a", "x", "bytes=10-19"), get("a", "y", "bytes=0-9")}, 0},
		{[]Request{get("a", "x", "bytes=5-19"), get("b", "x", "bytes=0-5")}, 1},
		{[]Request{get("a", "x", ""), get("a", "x", "bytes=10-19")}, 1},
		{[]Request{get("a", "x", "bytes=0-99"), get("a", "x", "bytes=10-19"), get("a", "x", "bytes=30-39")}, 2},
		{[]Request{get("a", "other", "bytes=0-9"), get("a", "other", "bytes=0-9")}, 0},
	} {
		if list := overlaps(c.log, []string{"x", "y"}); len(list) != c.want {
			t.Errorf("%v: %v, want %d", c.log, list, c.want)
		}
	}
}

// atOnce calls f for 0 to n-1, all at once, and waits.
func atOnce(n int, f func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { f(i) })
	}
	group.Wait()
}

// TestLoadOne: twenty containers of one image, which all begin to read at the same time, cost the registry what one costs,
// and the kernel one metadata image.
func TestLoadOne(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	layout, want := jobImage(t)
	image, layers := registry.Push(t, layout, "load"), layerDigests(t, layout)

	load := func(containers int) (requests int, bytes int64) {
		n := startNode(t, daemonOptions{}, containerdOptions{})
		before := n.traces()
		barrier := filepath.Join(n.Dir, "barrier")
		must(t, os.Mkdir(barrier, 0o755))
		bind := []string{"--mount", "type=bind,src=" + barrier + ",dst=/tmp,options=rbind:rw"}
		registry.Reset()
		must(t, n.pull(image))
		var group sync.WaitGroup
		for i := range containers {
			group.Go(func() {
				id := fmt.Sprint("c", i)
				script := "echo > /tmp/" + id + "; until [ -e /tmp/go ]; do sleep 0.2; done; " + jobScript[2]
				out, err := n.run(image, id, bind, "sh", "-c", script)
				if out = strings.TrimSpace(out); err != nil || out != want {
					t.Errorf("container %s: %v, output\n%s\nwant\n%s", id, err, out, want)
				}
			})
		}
		eventually(t, "not all containers run", func() bool {
			list, err := os.ReadDir(barrier)
			return err != nil || len(list) == containers
		})
		added := slices.DeleteFunc(n.traces(), func(s string) bool { return slices.Contains(before, s) })
		if n := loops(added); n != 1 {
			t.Errorf("%d containers have %d metadata images mounted, want one:\n%s", containers, n, strings.Join(added, "\n"))
		}
		must(t, os.WriteFile(barrier+"/go", nil, 0o644))
		group.Wait()
		n.daemon.quiet(t)
		if list := overlaps(registry.Log(), layers); len(list) > 0 {
			t.Errorf("%d containers: fetched twice: %v", containers, list)
		}
		n.mustCtr(t, "image", "delete", "--sync", image)
		n.settle(t, before)
		return registry.Traffic()
	}
	requests, bytes := load(1)
	manyRequests, manyBytes := load(20)
	t.Logf("one container: %d requests, %d bytes; 20: %d, %d", requests, bytes, manyRequests, manyBytes)
	// The kernel reads ahead as its memory and the order of faults have it.
	if manyRequests > requests+5 {
		t.Errorf("20 containers: %d requests, one: %d", manyRequests, requests)
	}
	if manyBytes > bytes+512<<10 {
		t.Errorf("20 containers: %d bytes, one: %d", manyBytes, bytes)
	}
}

// composeLayout makes an image of some of the layers of a layout.
func composeLayout(t testing.TB, dir string, which ...int) string {
	t.Helper()
	_, manifest, layers := readLayout(t, dir)
	image := emptyImage(t)
	for _, i := range which {
		d := manifest.Layers[i]
		var err error
		image, err = mutate.Append(image, mutate.Addendum{Layer: layers[i], MediaType: d.MediaType, Annotations: d.Annotations})
		must(t, err)
	}
	return saveLayout(t, image)
}

// emptyImage makes an image for this platform without layers.
func emptyImage(t testing.TB) v1.Image {
	t.Helper()
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{Env: []string{"PATH=/bin"}}})
	must(t, err)
	return image
}

// TestLoadMany: twenty images of as many repositories, with layers in common, are pulled and run at once. What they share is fetched
// once.
func TestLoadMany(t *testing.T) {
	needRoot(t)
	const images, groups = 20, 4
	// A layer for all is the first, then there is one for each group of images, and one for each image.
	content := func(i int) []byte { return noise(uint64(i), 300_000+1000*i) }
	var above []v1.Layer
	for i := range groups + images {
		above = append(above, tarLayer(t, func(add func(tar.Header, []byte)) {
			add(tar.Header{Name: fmt.Sprintf("l%d", i), Typeflag: tar.TypeReg, Mode: 0o644}, content(i))
		}))
	}
	all := convertLayout(t, runnableLayout(t, nil, above...), convert.Options{})
	layers := layerDigests(t, all)
	registry := NewRegistry(t, RegistryOptions{})
	var refs, want []string
	for i := range images {
		g := i % groups
		// Its own is the lowest, else containerd itself would see to it that who comes second waits.
		refs = append(refs, registry.Push(t, composeLayout(t, all, 1+groups+i, 0, 1+g), fmt.Sprint("many", i)))
		want = append(want, fmt.Sprintf("%x  /l%d\n%x  /l%d", sha256.Sum256(content(g)), g, sha256.Sum256(content(groups+i)), groups+i))
	}

	n := startNode(t, daemonOptions{}, containerdOptions{})
	before := n.traces()
	registry.Reset()
	atOnce(images, func(i int) {
		if err := n.pull(refs[i]); err != nil {
			t.Error(err)
			return
		}
		out, err := n.run(refs[i], fmt.Sprint("c", i), nil, "sha256sum", fmt.Sprintf("/l%d", i%groups), fmt.Sprintf("/l%d", groups+i))
		if out = strings.TrimSpace(out); err != nil || out != want[i] {
			t.Errorf("image %d: %v, output\n%s\nwant\n%s", i, err, out, want[i])
		}
	})
	n.daemon.quiet(t)
	if list := overlaps(registry.Log(), layers); len(list) > 0 {
		t.Errorf("fetched twice: %s", strings.Join(list, "\n"))
	}
	for _, ref := range refs {
		n.mustCtr(t, "image", "delete", "--sync", ref)
	}
	n.settle(t, before)
}

// TestNamespaces: an image that one namespace of containerd has costs another one its manifest, and outlives the removal in the first.
func TestNamespaces(t *testing.T) {
	needRoot(t)
	layout, want := jobImage(t)
	registry := NewRegistry(t, RegistryOptions{})
	image := registry.Push(t, layout, "shared")
	n := startNode(t, daemonOptions{}, containerdOptions{})
	before := n.traces()
	must(t, n.pull(image))
	n.job(t, image, "a", want)
	n.daemon.quiet(t)

	first, second := n.Namespace, n.Namespace+"x"
	registry.Reset()
	n.Namespace = second
	must(t, n.pull(image))
	n.Namespace = first
	n.mustCtr(t, "image", "delete", "--sync", image)
	if list := n.snapshots(t, first); len(list) > 0 {
		t.Errorf("snapshots of the first namespace are left: %v", list)
	}
	n.Namespace = second
	n.job(t, image, "b", want)
	n.daemon.quiet(t)
	layers := layerDigests(t, layout)
	for _, q := range registry.Log() { // the config may be asked for, to learn from the first namespace's start
		if slices.Contains(layers, path.Base(q.Path)) {
			t.Errorf("the second namespace fetched %+v", q)
		}
	}
	n.mustCtr(t, "image", "delete", "--sync", image)
	n.settle(t, before)
	n.Namespace = first
}

// A footprint is what a daemon's processes hold.
type footprint struct {
	server, keeper int // open descriptors
	goroutines     int
	live           map[string]int // objects on the server's heap, by the stack that made them
}

// footprint collects garbage and returns what is left. The daemon must have been started with GODEBUG=memprofilerate=1.
func (d *Daemon) footprint(t testing.TB) footprint {
	t.Helper()
	f := footprint{server: descriptors(t, d.server()), keeper: descriptors(t, d.keeper()), live: map[string]int{}}
	body, err := d.get("/debug/pprof/goroutine?debug=1")
	must(t, err)
	_, err = fmt.Sscanf(body, "goroutine profile: total %d", &f.goroutines)
	must(t, err)
	d.collect(t)
	body, err = d.get("/debug/pprof/heap?gc=1&debug=1")
	must(t, err)
	// "4: 256 [9: 576] @ 0x1 0x2", live objects and their bytes, and below a line that begins with # for each function.
	var objects int
	var stack []string
	add := func() {
		if objects > 0 {
			f.live[strings.Join(stack, "\n")] += objects
		}
		objects, stack = 0, nil
	}
	for line := range strings.Lines(body) {
		if function, ok := strings.CutPrefix(line, "#\t"); ok {
			if fields := strings.Fields(function); len(fields) > 1 {
				stack = append(stack, fields[1])
			}
			continue
		}
		add()
		fmt.Sscanf(line, "%d: ", &objects)
	}
	add()
	if len(f.live) < 100 {
		t.Fatalf("the profile of the heap has %d stacks: it is not complete", len(f.live))
	}
	return f
}

// collect has the server collect garbage: what has a cleanup goes with the second collection, what lies in a pool with the third.
func (d *Daemon) collect(t testing.TB) {
	t.Helper()
	for range 3 {
		_, err := d.get("/debug/pprof/heap?gc=1")
		must(t, err)
	}
}

// compare shows that no more is held than before, after something was done a number of times. Of the
// heap it sees a single object that stays each time.
func (f footprint) compare(t *testing.T, before footprint, times int, what string) {
	t.Helper()
	// Connections come and go, each with a descriptor and goroutines.
	if f.server >= before.server+times || f.keeper >= before.keeper+times {
		t.Errorf("%d %s: %d descriptors of the server and %d of the keeper are open, %d and %d were before", times, what, f.server, f.keeper, before.server, before.keeper)
	}
	if f.goroutines >= before.goroutines+times {
		t.Errorf("%d %s: %d goroutines, %d before", times, what, f.goroutines, before.goroutines)
	}
	for stack, objects := range f.live {
		// The Go runtime keeps its own for the next time, and so do connections, whose goroutines are not of the daemon's code.
		if more := objects - before.live[stack]; more >= times && strings.Contains(stack, "lazuli/") {
			t.Errorf("%d %s: %d objects more are live that were made by\n%s", times, what, more, stack)
		}
	}
}

func descriptors(t testing.TB, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	return len(list)
}

// TestCycles: containers and images that come and go leave nothing in the daemon or in the kernel.
func TestCycles(t *testing.T) {
	needRoot(t)
	layout, want := jobImage(t)
	registry := NewRegistry(t, RegistryOptions{})
	image, other := registry.Push(t, layout, "cycle"), registry.Push(t, layout, "other")
	n := startNode(t, daemonOptions{Env: []string{"GODEBUG=memprofilerate=1"}}, containerdOptions{})
	must(t, n.pull(image))
	n.job(t, image, "first", want) // from now on its metadata image is mounted, until it is removed
	before := n.traces()
	containers := func(cycles int) footprint {
		const side = 4 // by side
		atOnce(side, func(part int) {
			for i := part; i < cycles; i += side {
				out, err := n.run(image, fmt.Sprint("c", i), nil, "sh", "-c", "cat /data/greeting; echo mine > /data/greeting; cat /data/greeting")
				if err != nil || out != "hello\nmine\n" {
					t.Errorf("container %d: %q, %v", i, out, err)
				}
			}
		})
		n.settle(t, before)
		return n.daemon.footprint(t)
	}
	images := func(cycles int) footprint {
		for range cycles {
			must(t, n.pull(other))
			n.mustCtr(t, "image", "delete", "--sync", other)
		}
		n.settle(t, before)
		return n.daemon.footprint(t)
	}
	first := containers(10)
	containers(40).compare(t, first, 40, "containers")
	first = images(3)
	images(10).compare(t, first, 10, "images")
}

// filesLayer makes the blob and the entries of an eStargz layer of n files in directories of a thousand, each file with a content and
// a compressed stream of its own: the most that a fetcher can have to know about them.
func filesLayer(t testing.TB, seed, n int) mutate.Addendum {
	t.Helper()
	var blob, toc bytes.Buffer
	toc.WriteString(`{"version":1,"entries":[`)
	for i := range n {
		if i%1000 == 0 {
			fmt.Fprintf(&toc, `{"name":"d%03d/","type":"dir","mode":493},`, i/1000)
		}
		content := fileContent(seed, i)
		fmt.Fprintf(&toc, `{"name":"d%03[1]d/f%06[2]d","type":"reg","mode":420,"size":%[3]d,"offset":%[4]d,"digest":"sha256:%[5]x","chunkDigest":"sha256:%[5]x"},`,
			i/1000, i, len(content), blob.Len(), sha256.Sum256(content))
		// A gzip stream of one stored block: RFC 1952 and 1951.
		blob.WriteString("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x01")
		var b [4]byte
		binary.LittleEndian.PutUint16(b[:2], uint16(len(content)))
		binary.LittleEndian.PutUint16(b[2:], ^uint16(len(content)))
		blob.Write(b[:])
		blob.Write(content)
		blob.Write(binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(content)))
		blob.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(content))))
	}
	toc.Truncate(toc.Len() - 1) // the last comma
	toc.WriteString("]}")
	at := blob.Len()
	z, _ := gzip.NewWriterLevel(&blob, gzip.BestSpeed)
	w := tar.NewWriter(z)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: int64(toc.Len()), Format: tar.FormatGNU}))
	_, err := w.Write(toc.Bytes())
	must(t, err)
	must(t, w.Close())
	must(t, z.Close())
	fmt.Fprintf(&blob, estargzFooter, at)
	return mutate.Addendum{
		Layer:       static.NewLayer(blob.Bytes(), types.OCILayer),
		Annotations: map[string]string{"containerd.io/snapshot/stargz/toc.digest": fmt.Sprintf("sha256:%x", sha256.Sum256(toc.Bytes()))},
	}
}

// estargzFooter has the place of the table of contents in the blob:
// https://github.com/containerd/stargz-snapshotter/blob/main/docs/estargz.md#footer
const estargzFooter = "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"

func fileContent(seed, i int) []byte { return fmt.Appendf(nil, "file %d of image %d\n", i, seed) }

// TestMemory: ten images with a million entries together, all mounted, are small on the server's heap: what it knows of
// files lies in mapped tables.
func TestMemory(t *testing.T) {
	needRoot(t)
	const images, files = 10, 100_000
	registry := NewRegistry(t, RegistryOptions{})
	n := startNode(t, daemonOptions{}, containerdOptions{})
	heap := func() int64 {
		n.daemon.collect(t)
		body, err := n.daemon.get("/metrics")
		must(t, err)
		return int64(metric(t, body, "go_memstats_heap_alloc_bytes"))
	}
	idle := heap()
	entries, last := 0, ""
	for i := range images {
		begun := time.Now()
		image, err := mutate.Append(emptyImage(t), filesLayer(t, i, files))
		must(t, err)
		layout := saveLayout(t, image)
		ref := registry.Push(t, layout, fmt.Sprint("files", i))
		made := time.Now()
		must(t, n.pull(ref))
		dir, undo := n.mount(t, n.Namespace, chainID(t, layout))
		t.Cleanup(undo)
		t.Logf("image %d: made in %v, pulled and mounted in %v", i, made.Sub(begun).Round(time.Millisecond), time.Since(made).Round(time.Millisecond))
		last = dir
	}
	chains, err := filepath.Glob(n.daemon.Root + "/chains/*")
	must(t, err)
	for _, dir := range chains {
		subs, err := os.ReadDir(dir)
		must(t, err)
		entries += len(subs)
		for _, s := range subs {
			f, err := os.Open(filepath.Join(dir, s.Name()))
			must(t, err)
			names, err := f.Readdirnames(0)
			must(t, err)
			f.Close()
			entries += len(names)
		}
	}
	t.Logf("%d entries in %d metadata images", entries, len(chains))
	if entries < images*files {
		t.Errorf("%d entries are mounted, want %d", entries, images*files)
	}
	used := heap()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.daemon.server()))
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "VmHWM") {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
	}
	t.Logf("heap: %.1f MiB, without images %.1f MiB; %s", float64(used)/(1<<20), float64(idle)/(1<<20), strings.Join(lines, ", "))
	if used > 64<<20 {
		t.Errorf("the server's heap has %d MiB, want less than 64", used>>20)
	}
	// Only now, since the fetcher reads ahead what is thousands of files here.
	b, err := os.ReadFile(fmt.Sprintf("%s/d%03d/f%06d", last, (files-1)/1000, files-1))
	if want := fileContent(images-1, files-1); err != nil || !bytes.Equal(b, want) {
		t.Errorf("the last file is %q, %v, want %q", b, err, want)
	}
}

// metric returns a value of what a daemon answers to Prometheus.
func metric(t testing.TB, body, name string) float64 {
	t.Helper()
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			must(t, err)
			return f
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// TestLayers127: as many layers as an image may have, lazy and ordinary ones.
func TestLayers127(t *testing.T) {
	needRoot(t)
	const count = 127
	var layers []v1.Layer
	sum := sha256.New()
	for i := 1; i < count; i++ {
		content := noise(uint64(i), 10_000)
		sum.Write(content)
		layers = append(layers, tarLayer(t, func(add func(tar.Header, []byte)) {
			add(tar.Header{Name: "f/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
			add(tar.Header{Name: fmt.Sprintf("f/%03d", i), Typeflag: tar.TypeReg, Mode: 0o644}, content)
			add(tar.Header{Name: "f/last", Typeflag: tar.TypeReg, Mode: 0o644}, fmt.Appendln(nil, "layer", i))
			add(tar.Header{Name: fmt.Sprintf("f/.wh.gone%d", i-1), Typeflag: tar.TypeReg, Mode: 0o644}, nil)
			add(tar.Header{Name: fmt.Sprintf("f/gone%d", i), Typeflag: tar.TypeReg, Mode: 0o644}, nil)
		}))
	}
	want := fmt.Sprintf("%x  -\nlayer %d\n/f/gone%[2]d", sum.Sum(nil), count-1)
	ordinary := runnableLayout(t, nil, layers...)
	converted := convertLayout(t, ordinary, convert.Options{})
	registry := NewRegistry(t, RegistryOptions{})
	n := startNode(t, daemonOptions{}, containerdOptions{})
	before := n.traces()
	for _, c := range []struct{ name, layout string }{{"lazy", converted}, {"ordinary", ordinary}} {
		image := registry.Push(t, c.layout, c.name)
		registry.Reset()
		begun := time.Now()
		// It may take longer than other things here: each ordinary layer is unpacked above all that are below it.
		ctx, cancel := context.WithTimeout(t.Context(), 5*patience)
		defer cancel()
		_, err := commandFor(ctx, n.client, "--address", n.socket(), "--namespace", n.Namespace, "image", "pull", "--snapshotter", n.snapshotter(), "--plain-http", image)
		must(t, err)
		pulled := time.Now()
		requests, _ := registry.Traffic()
		out, err := n.run(image, c.name, nil, "sh", "-c", "cat /f/[0-9]* | sha256sum; cat /f/last; echo /f/gone*")
		if out = strings.TrimSpace(out); err != nil || out != want {
			t.Errorf("%s: %v, output\n%s\nwant\n%s", c.name, err, out, want)
		}
		calls, err := n.daemon.get("/metrics")
		must(t, err)
		for _, method := range []string{"Prepare", "Commit"} {
			if sum := `lazuli_snapshots_call_seconds_sum{code="OK",method="` + method + `"}`; strings.Contains(calls, sum) {
				t.Logf("%s: %.1f s so far", method, metric(t, calls, sum))
			}
		}
		t.Logf("%s: pulled in %v with %d requests, run in %v", c.name, pulled.Sub(begun).Round(time.Millisecond), requests, time.Since(pulled).Round(time.Millisecond))
		if c.layout == converted {
			// containerd asks for the manifest twice and for the config, the daemon for the manifest and for what refers to it.
			if requests > count+8 {
				t.Errorf("a pull of %d lazy layers took %d requests", count, requests)
			}
			n.lazily(t, registry, layerDigests(t, converted), n.Namespace)
		}
		n.mustCtr(t, "image", "delete", "--sync", image)
		n.settle(t, before)
	}
}

// usage returns what a snapshot takes, as the snapshotter says.
func (n *node) usage(t testing.TB, key string) (size, inodes int64) {
	t.Helper()
	out := n.mustCtr(t, "snapshot", "--snapshotter", n.snapshotter(), "usage", "-b", key)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var name string
	if _, err := fmt.Sscan(lines[len(lines)-1], &name, &size, &inodes); err != nil || name != key {
		t.Fatalf("ctr snapshot usage: %v\n%s", err, out)
	}
	return size, inodes
}

// TestUsage: what the snapshotter says that snapshots take is what is here, and a container sees the disk that it writes to.
func TestUsage(t *testing.T) {
	needRoot(t)
	layout, want := jobImage(t)
	registry := NewRegistry(t, RegistryOptions{})
	image := registry.Push(t, layout, "usage")
	n := startNode(t, daemonOptions{}, containerdOptions{})
	must(t, n.pull(image))
	top := chainID(t, layout)
	if size, inodes := n.usage(t, top); size != 0 || inodes != 0 {
		t.Errorf("after the pull: %d bytes, %d inodes", size, inodes)
	}
	dir, undo := n.mount(t, n.Namespace, top)
	b, err := os.ReadFile(dir + "/data/greeting")
	must(t, err)
	n.daemon.quiet(t)
	small, inodes := n.usage(t, top)
	if small < int64(len(b)) || inodes < 1 {
		t.Errorf("after a read of %d bytes: %d bytes, %d inodes", len(b), small, inodes)
	}
	undo()
	n.job(t, image, "a", want)
	n.daemon.quiet(t)
	if size, inodes := n.usage(t, top); size != jobSize+int64(len(b)) || inodes != 2 {
		t.Errorf("when all is here: %d bytes, %d inodes, want %d, 2", size, inodes, jobSize+len(b))
	}

	// A container's own.
	_, err = n.run(image, "b", []string{"--detach"}, "sleep", "1000000")
	must(t, err)
	empty, _ := n.usage(t, "b")
	_, err = n.exec("b", "sh", "-c", "cat /data/noise > /data/copy")
	must(t, err)
	if size, _ := n.usage(t, "b"); size < empty+jobSize || size > empty+jobSize+64<<10 {
		t.Errorf("a container that wrote %d bytes: %d bytes, %d before", jobSize, size, empty)
	}
	out, err := n.exec("b", "busybox", "stat", "-f", "-c", "%b %S", "/")
	must(t, err)
	var st unix.Statfs_t
	must(t, unix.Statfs(n.daemon.Root, &st))
	if want := fmt.Sprintln(st.Blocks, st.Frsize); out != want {
		t.Errorf("a container's file system has blocks, and bytes in each: %q, the disk %q", out, want)
	}
	n.mustCtr(t, "task", "delete", "--force", "b")
	n.mustCtr(t, "container", "delete", "b")
}

// TestPullAgain: what was fetched of an image that was removed is there when it comes back, as long as the store has room.
func TestPullAgain(t *testing.T) {
	needRoot(t)
	layout, want := jobImage(t)
	registry := NewRegistry(t, RegistryOptions{})
	image := registry.Push(t, layout, "again")
	n := startNode(t, daemonOptions{}, containerdOptions{})
	before := n.traces()
	for i := range 2 {
		registry.Reset()
		must(t, n.pull(image))
		n.job(t, image, fmt.Sprint("c", i), want)
		n.daemon.quiet(t)
		n.mustCtr(t, "image", "delete", "--sync", image)
		n.settle(t, before)
	}
	layers := layerDigests(t, layout)
	for _, q := range registry.Log() {
		if slices.Contains(layers, filepath.Base(q.Path)) {
			t.Errorf("the second time: %+v", q)
		}
	}
}
