package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/remote"
	"lazuli/fs/store"
)

// A Record is what a node remembers of an image that was mounted.
type Record struct {
	Reference string        `json:"reference"`
	Digest    string        `json:"digest"` // of the manifest
	Chain     string        `json:"chain"`  // names the metadata image
	Layers    []RecordLayer `json:"layers"`
	Used      time.Time     `json:"used"`
	Dir       string        `json:"dir,omitempty"` // where it is mounted, in the record beside a mount
}

// A RecordLayer is one layer of a Record, and all that another process needs to go on with it.
type RecordLayer struct {
	ID     string `json:"id"` // names what the store keeps of it
	Digest string `json:"digest,omitempty"`
	Size   int64  `json:"size"` // of the blob, in bytes
	Lazy   bool   `json:"lazy"`
	// Compressed says that the digest in ID is that of the compressed table of contents, as zstd:chunked has it.
	Compressed bool `json:"compressed,omitempty"`
	// DiffID is what the image's config claims.
	DiffID string `json:"diffID,omitempty"`
	// Reference names an image that has the blob, by its digest. "" is for a layer that no registry has.
	Reference string `json:"reference,omitempty"`
}

// An Image is a Record and how much of the image is here.
type Image struct {
	Record
	Objects, ObjectsHere int   // files with different content
	Bytes, BytesHere     int64 // of files, each content once
	InUse                bool  // it is mounted
	Containerd           bool  // containerd has it, and removes it
}

func (n *Node) recordPath(reference string) string {
	sum := sha256.Sum256([]byte(reference))
	return filepath.Join(n.root, "images", hex.EncodeToString(sum[:16])+".json")
}

// writeRecord notes that an image is used: among the images that are kept, and in the mount's own folder.
func (n *Node) writeRecord(r *Record, dir string) error {
	path := n.recordPath(r.Reference)
	return errors.Join(r.Write(path), r.Write(filepath.Join(dir, filepath.Base(path))))
}

// Write writes the record to a file, which has it whole or not at all.
func (r *Record) Write(path string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// ReadRecord reads what [Record.Write] wrote.
func ReadRecord(path string) (Record, error) {
	var r Record
	b, err := os.ReadFile(path)
	if err == nil {
		if err = json.Unmarshal(b, &r); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	return r, err
}

// holdImages locks the set of images: shared by who adds to it, exclusively (unix.LOCK_EX) by who removes from it.
func (n *Node) holdImages(how int) (release func(), err error) {
	f, err := os.OpenFile(filepath.Join(n.root, "images", "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// readRecords returns the records whose paths match a pattern.
func readRecords(pattern string) ([]Record, error) {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var records []Record
	for _, path := range paths {
		r, err := ReadRecord(path)
		var syntax *json.SyntaxError
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case errors.As(err, &syntax): // a record that a power cut damaged is no record
		case err != nil:
			return nil, err
		default:
			records = append(records, r)
		}
	}
	return records, nil
}

// inUse returns the records of what processes, a daemon and containerd use.
func (n *Node) inUse() ([]Record, error) {
	var all []Record
	for _, pattern := range []string{"run/*/*/*.json", "mounts/*/*.json", "snapshots/*/*.json"} {
		records, err := readRecords(filepath.Join(n.root, pattern))
		if err != nil {
			return nil, err
		}
		all = append(all, records...)
	}
	return all, nil
}

// Images returns the images that are kept, last used first.
func (n *Node) Images() ([]Image, error) {
	records, err := readRecords(filepath.Join(n.root, "images", "*.json"))
	if err != nil {
		return nil, err
	}
	pulled, err := readRecords(filepath.Join(n.root, "snapshots", "*", ImageRecord))
	if err != nil {
		return nil, err
	}
	used, err := n.inUse()
	if err != nil {
		return nil, err
	}
	records = append(pulled, records...)
	images := make([]Image, len(records))
	for i, r := range records {
		images[i] = Image{Record: r, Containerd: i < len(pulled)}
		images[i].InUse = slices.ContainsFunc(used, func(u Record) bool {
			// What is mounted has a folder, or no name; what containerd keeps of an image or a layer has neither.
			return u.Chain == r.Chain && u.Chain != "" && (u.Dir != "" || u.Reference == "")
		})
		seen := map[store.Key]bool{}
		for _, l := range r.Layers {
			err := n.objectsOf(l.ID, func(key store.Key, size int64) bool {
				if seen[key] {
					return true
				}
				seen[key] = true
				here := n.store.Here(key, size)
				images[i].Objects++
				images[i].Bytes += size
				images[i].BytesHere += here
				if here == size {
					images[i].ObjectsHere++
				}
				return true
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%s: %w", r.Reference, err)
			}
		}
	}
	slices.SortStableFunc(images, func(a, b Image) int { return b.Used.Compare(a.Used) })
	return images, nil
}

// ImageRecord is the name of the record that stands in the folder of the topmost snapshot of an image that containerd has.
const ImageRecord = "image.json"

// ErrInUse says that an image cannot be removed because a process has it mounted.
var ErrInUse = errors.New("in use")

// Remove forgets an image and removes what only it needed. It returns the bytes of disk that became free.
func (n *Node) Remove(reference string) (freed int64, err error) {
	release, err := n.holdImages(unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer release()
	used, err := n.inUse()
	if err != nil {
		return 0, err
	}
	if slices.ContainsFunc(used, func(u Record) bool { return u.Reference == reference && u.Dir != "" }) {
		return 0, fmt.Errorf("%s: %w: unmount it first", reference, ErrInUse)
	}
	err = os.Remove(n.recordPath(reference))
	if errors.Is(err, fs.ErrNotExist) {
		pulled, err := readRecords(filepath.Join(n.root, "snapshots", "*", ImageRecord))
		if err != nil {
			return 0, err
		}
		if slices.ContainsFunc(pulled, func(r Record) bool { return r.Reference == reference }) {
			return 0, fmt.Errorf("%s: %w: containerd has it: ctr images rm, nerdctl rmi or crictl rmi removes it", reference, ErrInUse)
		}
		return 0, fmt.Errorf("%s: no such image here: lazuli images lists them", reference)
	}
	if err != nil {
		return 0, err
	}
	return n.prune()
}

// Prune removes everything from the store that no image needs. It returns the bytes of disk that became free.
func (n *Node) Prune() (freed int64, err error) {
	release, err := n.holdImages(unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer release()
	return n.prune()
}

// Bound makes room until the store's objects take at most limit bytes of disk: it removes what no image needs, the longest
// unused first, and then forgets images that nobody uses. What containerd has or what is mounted stays. It returns the
// bytes that became free, and how much is left.
func (n *Node) Bound(limit int64) (freed, left int64, err error) {
	if left, err = n.store.Size(); err != nil || left <= limit {
		return 0, left, err
	}
	release, err := n.holdImages(unix.LOCK_EX)
	if err != nil {
		return 0, left, err
	}
	defer release()
	for {
		f, err := n.evict(left - limit)
		freed += f // not all of it were objects
		if err == nil {
			left, err = n.store.Size()
		}
		if err != nil || left <= limit {
			return freed, left, err
		}
		oldest, err := n.oldestUnused()
		if err != nil || oldest == "" {
			return freed, left, err
		}
		n.log.Info("forgetting an image that nobody uses: the store is full", "image", oldest, "max_size", limit)
		if err := os.Remove(n.recordPath(oldest)); err != nil {
			return freed, left, err
		}
	}
}

// oldestUnused returns the image that is kept, is not mounted, and was used longest ago, or "".
func (n *Node) oldestUnused() (reference string, err error) {
	kept, err := readRecords(filepath.Join(n.root, "images", "*.json"))
	if err != nil {
		return "", err
	}
	used, err := n.inUse()
	if err != nil {
		return "", err
	}
	var oldest time.Time
	for _, r := range kept {
		mounted := slices.ContainsFunc(used, func(u Record) bool { return u.Reference == r.Reference && u.Dir != "" })
		if !mounted && (reference == "" || r.Used.Before(oldest)) {
			reference, oldest = r.Reference, r.Used
		}
	}
	return reference, nil
}

// prune is Prune for who holds the images exclusively.
func (n *Node) prune() (freed int64, err error) { return n.evict(-1) }

// evict removes what no record names: tables of contents and metadata images, and objects until enough bytes became free; a
// negative enough is never enough. The caller holds the images exclusively.
func (n *Node) evict(enough int64) (freed int64, err error) {
	kept, err := readRecords(filepath.Join(n.root, "images", "*.json"))
	if err != nil {
		return 0, err
	}
	used, err := n.inUse()
	if err != nil {
		return 0, err
	}
	keep := map[string]bool{} // names in layers/ and meta/
	objects := map[store.Key]bool{}
	for _, r := range append(kept, used...) {
		keep[r.Chain+".erofs"] = true
		for _, l := range r.Layers {
			if keep[l.ID] {
				continue
			}
			keep[l.ID] = true
			err := n.objectsOf(l.ID, func(key store.Key, _ int64) bool { objects[key] = true; return true })
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return 0, err
			}
		}
	}
	for _, sub := range []string{"layers", "meta"} {
		entries, err := os.ReadDir(n.store.Path(sub))
		if err != nil {
			return freed, err
		}
		for _, e := range entries {
			if keep[e.Name()] {
				continue
			}
			path := n.store.Path(sub, e.Name())
			freed += diskUse(path)
			if err := os.RemoveAll(path); err != nil {
				return freed, err
			}
		}
	}
	n2, err := n.store.Evict(func(key store.Key) bool { return objects[key] }, enough)
	return freed + n2, err
}

// diskUse is how many bytes of disk a file or folder takes.
func diskUse(path string) int64 {
	var sum int64
	filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum
}

// Find returns the reference of the kept image that the user means: the reference itself, or a digest or the beginning of one.
func Find(images []Image, name string) (string, error) {
	var found []string
	for _, i := range images {
		if i.Reference == name {
			return name, nil
		}
		if len(name) >= 6 && strings.HasPrefix(strings.TrimPrefix(i.Digest, "sha256:"), strings.TrimPrefix(name, "sha256:")) {
			found = append(found, i.Reference)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%s: no such image here: lazuli images lists them", name)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%s means several images: %s", name, strings.Join(found, ", "))
}

// Repositories returns the names of the registries' repositories that something on this node came from, as name.Repository.Name has
// them.
func (n *Node) Repositories() (map[string]bool, error) {
	kept, err := readRecords(filepath.Join(n.root, "images", "*.json"))
	if err != nil {
		return nil, err
	}
	used, err := n.inUse()
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, r := range append(kept, used...) {
		references := []string{r.Reference}
		for _, l := range r.Layers {
			references = append(references, l.Reference)
		}
		for _, s := range references {
			if ref, err := remote.ParseReference(s); err == nil && ref.Name() != nil {
				names[ref.Name().Context().Name()] = true
			}
		}
	}
	return names, nil
}
